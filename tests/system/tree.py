"""Digest of a tree, and the comparison of two. As a program: `tree.py DIR [FIELD...]` pickles the digest to stdout."""

import hashlib
import os
import pickle
import stat
import subprocess
import sys

from sandbox import PATIENCE

# Fields of an entry; those that need not be equal are left out by the caller.
FIELDS = ('mode', 'uid', 'gid', 'size', 'nlink', 'mtime', 'rdev', 'xattrs', 'data', 'links', 'ino', 'ctime', 'holes')
SAME_FILE_SYSTEM_SEEN = ('mode', 'uid', 'gid', 'size', 'nlink', 'mtime', 'rdev', 'xattrs', 'data', 'links', 'ino',
                         'ctime')
SAME_CONTENT = ('mode', 'uid', 'gid', 'size', 'nlink', 'mtime', 'rdev', 'xattrs', 'data', 'links')


def _hash(path):
    digest = hashlib.blake2b(digest_size=16)
    with open(path, 'rb', buffering=0) as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _holes(path, size):
    """How many of the file's 4 KiB blocks are holes."""
    fd = os.open(path, os.O_RDONLY)
    try:
        at = data = 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(fd, start, os.SEEK_HOLE)
            data += (at + 4095) // 4096 - start // 4096
        return (size + 4095) // 4096 - data
    finally:
        os.close(fd)


def _xattrs(path):
    return tuple((name, os.getxattr(path, name, follow_symlinks=False))
                 for name in sorted(os.listxattr(path, follow_symlinks=False)))


def _entry(path, relative, groups, fields):
    s = os.lstat(path)
    directory = stat.S_ISDIR(s.st_mode)
    entry = {
        'mode': s.st_mode, 'uid': s.st_uid, 'gid': s.st_gid, 'size': 0 if directory else s.st_size,
        'nlink': 0 if directory else s.st_nlink, 'mtime': s.st_mtime_ns, 'ino': s.st_ino, 'ctime': s.st_ctime_ns,
        'rdev': s.st_rdev if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode) else 0,
        'links': groups.setdefault((s.st_dev, s.st_ino), relative) if s.st_nlink > 1 and not directory else None,
    }
    if 'xattrs' in fields:
        entry['xattrs'] = _xattrs(path)
    if stat.S_ISREG(s.st_mode) and 'data' in fields:
        entry['data'] = _hash(path)
    if stat.S_ISREG(s.st_mode) and 'holes' in fields:
        entry['holes'] = _holes(path, s.st_size)
    if stat.S_ISLNK(s.st_mode):
        entry['data'] = os.readlink(path)
    return {field: entry[field] for field in fields if field in entry}


def walk(root, fields=SAME_CONTENT, skip=(b'.sharefs', b'lost+found')):
    root = os.fsencode(root)
    groups, out, stack = {}, {}, [b'']
    while stack:
        relative = stack.pop()
        path = root + b'/' + relative if relative else root
        out[relative] = _entry(path, relative, groups, fields)
        if stat.S_ISDIR(out[relative]['mode']):
            names = [n for n in os.listdir(path) if relative or n not in skip]
            # Sorted, so that the first name of a hard link group is the same in every copy.
            stack += [relative + b'/' + n if relative else n for n in sorted(names, reverse=True)]
    return out


def digest(root, fields=SAME_CONTENT, timeout=120):
    """The digest, made by a process of its own: a mount that hangs must not hang the test."""
    result = subprocess.run([sys.executable, __file__, root, *fields], capture_output=True,
                            timeout=timeout * PATIENCE)
    if result.returncode != 0:
        raise AssertionError(f'cannot read {root}: {result.stderr.decode()[-600:]}')
    return pickle.loads(result.stdout)


def differences(a, b, limit=20):
    """Lines that say what is different in the second digest."""
    out = []
    for path in sorted(a.keys() | b.keys()):
        if path not in a or path not in b:
            out.append(f'{path!r} is only in the {"first" if path in a else "second"}')
        elif a[path] != b[path]:
            fields = [f'{k} {a[path].get(k)!r} / {b[path].get(k)!r}' for k in sorted(a[path].keys() | b[path].keys())
                      if a[path].get(k) != b[path].get(k)]
            out.append(f'{path!r}: {", ".join(fields)}')
    return out[:limit] + ([f'... {len(out) - limit} more'] if len(out) > limit else [])


def assert_same(first, second, what):
    """Of two digests."""
    found = differences(first, second)
    if found:
        raise AssertionError(f'{what}:\n  ' + '\n  '.join(found))


def assert_equal(first, second, fields=SAME_CONTENT):
    """Of two directories."""
    assert_same(digest(first, fields), digest(second, fields), f'{first} and {second} differ')


if __name__ == '__main__':
    sys.stdout.buffer.write(pickle.dumps(walk(sys.argv[1], tuple(sys.argv[2:]) or SAME_CONTENT)))
