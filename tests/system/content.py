"""Trees for the tests to adopt."""

import errno
import os
import random
import stat


def small(directory, files=200, seed=1, size=40_000):
    """Files of all kinds: some MB in a few directories, hard links, holes, devices, xattrs, odd names and owners."""
    r = random.Random(seed)
    for i in range(files):
        where = f'{directory}/dir{i % 7}/sub{i % 3}'
        os.makedirs(where, exist_ok=True)
        path = f'{where}/file{i}'
        with open(path, 'wb') as f:
            f.write(r.randbytes(r.randrange(size)))
        os.chmod(path, r.choice((0o644, 0o600, 0o755, 0o4755)))
        os.chown(path, r.choice((0, 1000, 65534)), r.choice((0, 100)))
        if r.random() < 0.2:
            os.setxattr(path, 'user.note', r.randbytes(50))
        os.utime(path, ns=(10**18, 10**18 + r.randrange(10**15)))
    special = f'{directory}/special'
    os.mkdir(special)
    with open(f'{special}/sparse', 'wb') as f:
        f.truncate(8 << 20)
        f.seek(3 << 20)
        f.write(b'in the middle of holes' * 1000)
    for i in range(3):
        os.link(f'{directory}/dir0/sub0/file0', f'{special}/link{i}')
    os.symlink('../dir1', f'{special}/symlink')
    os.symlink('nowhere', f'{special}/dangling')
    os.mkfifo(f'{special}/fifo', 0o640)
    os.mknod(f'{special}/null', stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(f'{special}/socket', stat.S_IFSOCK | 0o600)
    with open(os.fsencode(special) + b'/\xff\xfe\n', 'wb') as f:
        f.write(b'a name that is not text')
    os.mkdir(f'{special}/empty', 0o1777)
    os.utime(f'{special}/empty', (5, 5))


def bulk(directory, megabytes, seed=1):
    """Large files that do not compress, each different."""
    noise = random.Random(seed).randbytes(1 << 20) * 2
    for i in range(0, megabytes, 8):
        with open(f'{directory}/bulk{i}', 'wb') as f:
            for j in range(i, min(i + 8, megabytes)):
                f.write(j.to_bytes(8, 'little') + noise[j * 1009:j * 1009 + (1 << 20) - 8])


def many(directory, files, per_directory=200):
    for i in range(files):
        where = f'{directory}/m{i // per_directory // 100}/n{i // per_directory}'
        if i % per_directory == 0:
            os.makedirs(where, exist_ok=True)
        with open(f'{where}/f{i}', 'wb') as f:
            f.write(b'%d ' % i * 20)


def write(path, data):
    """A file."""
    with open(path, 'wb') as f:
        f.write(data)


def fill_disk(path):
    """Writes a file until its disk has no room for anything more."""
    with open(path, 'wb', buffering=0) as file:
        for size in (1 << 16, 512):
            try:
                while file.write(b'x' * size) == size:
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC, error
