"""A process that performs file operations on request, with an identity of its own.

The test talks to it over pipes, so one test can act as several users in several processes on several mounts, and a mount
that hangs does not hang the test. `Actor(root).do('mkdir', 'a', 0o755)` returns ('ok', value) or ('errno', name).
"""

import ctypes
import errno
import fcntl
import mmap
import os
import pickle
import select
import socket
import stat
import struct
import subprocess
import sys
import time

import sandbox

libc = ctypes.CDLL(None, use_errno=True)
UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16


def _checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), '')
    return result


def file_handle(path):
    """What name_to_handle_at(2) says."""
    handle = (ctypes.c_uint32 * 34)(128)  # room, type, bytes
    _checked(libc.name_to_handle_at(-100, os.fsencode(path), handle, ctypes.byref(ctypes.c_int()), 0))
    return bytes(handle)


def open_by_handle(mountpoint, handle):
    root = os.open(mountpoint, os.O_RDONLY)
    try:
        return _checked(libc.open_by_handle_at(root, handle, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        os.close(root)


def _kind(mode):
    return {stat.S_IFREG: 'file', stat.S_IFDIR: 'directory', stat.S_IFLNK: 'link', stat.S_IFIFO: 'fifo',
            stat.S_IFSOCK: 'socket', stat.S_IFCHR: 'character', stat.S_IFBLK: 'block'}[stat.S_IFMT(mode)]


def _shape(s):
    """What of a stat must be the same on every file system."""
    kind = _kind(s.st_mode)
    return {'kind': kind, 'mode': oct(stat.S_IMODE(s.st_mode)), 'nlink': s.st_nlink, 'uid': s.st_uid, 'gid': s.st_gid,
            'size': s.st_size if kind in ('file', 'link') else None,
            'rdev': s.st_rdev if kind in ('character', 'block') else None}


class _Descriptors(dict):
    def __missing__(self, name):
        raise OSError(errno.EBADF, f'{name} is not open')


class Operations:
    """The operations by name. Paths are relative to the root; open descriptors are named by the caller."""

    def __init__(self, root):
        self._root = os.fsencode(root)
        self._open = _Descriptors()

    def _path(self, path):
        return self._root + (b'/' + os.fsencode(path) if path else b'')

    # --- names
    def mkdir(self, path, mode=0o755):
        os.mkdir(self._path(path), mode)

    def mknod(self, path, mode, device=0):
        os.mknod(self._path(path), mode, device)

    def rmdir(self, path):
        os.rmdir(self._path(path))

    def unlink(self, path):
        os.unlink(self._path(path))

    def rename(self, old, new, flags=0):
        _checked(libc.renameat2(-100, self._path(old), -100, self._path(new), flags))

    def link(self, old, new):
        os.link(self._path(old), self._path(new), follow_symlinks=False)

    def symlink(self, target, path):
        os.symlink(target, self._path(path))

    def readlink(self, path):
        return os.readlink(self._path(path))

    def list(self, path=''):
        names = os.listdir(self._path(path))
        assert len(set(names)) == len(names), f'listed twice: {names}'
        return sorted(n for n in names if path or n not in (b'lost+found', b'.sharefs'))

    def list_types(self, path=''):
        """Names with the type that the directory says; its inode numbers must be those of stat."""
        with os.scandir(self._path(path)) as entries:
            found = []
            for e in entries:
                s = e.stat(follow_symlinks=False)
                assert e.inode() == s.st_ino, f'{e.name}: d_ino {e.inode()} but st_ino {s.st_ino}'
                found.append((e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False), e.is_symlink()))
            return sorted(found)

    def make_deep(self, path, name, depth):
        """A chain of directories that is longer than PATH_MAX; returns how deep it went and what is at its end."""
        here = os.open('.', os.O_RDONLY)
        os.chdir(self._path(path))
        try:
            for _ in range(depth):
                os.mkdir(name)
                os.chdir(name)
            with open('end', 'w') as f:
                f.write('deep')
            os.rename('end', 'End')
            return os.listdir('.'), open('End').read()
        finally:
            os.fchdir(here)
            os.close(here)

    # --- attributes
    def stat(self, path=''):
        return _shape(os.stat(self._path(path)))

    def lstat(self, path=''):
        return _shape(os.lstat(self._path(path)))

    def fstat(self, fd):
        return _shape(os.fstat(self._open[fd]))

    def same_inode(self, a, b):
        return os.lstat(self._path(a)).st_ino == os.lstat(self._path(b)).st_ino

    def times(self, path):
        s = os.lstat(self._path(path))
        return s.st_atime_ns, s.st_mtime_ns

    def mtime(self, path):
        return os.lstat(self._path(path)).st_mtime_ns

    def remember_times(self, path):
        s = os.lstat(self._path(path))
        self._times = s.st_mtime_ns, s.st_ctime_ns
        time.sleep(0.012)  # longer than a tick of the clock that stamps files

    def which_times_moved(self, path):
        s = os.lstat(self._path(path))
        return s.st_mtime_ns > self._times[0], s.st_ctime_ns > self._times[1]

    def chmod(self, path, mode):
        os.chmod(self._path(path), mode)

    def fchmod(self, fd, mode):
        os.fchmod(self._open[fd], mode)

    def chown(self, path, uid, gid):
        os.lchown(self._path(path), uid, gid)

    def utimens(self, path, atime, mtime):
        """Times in ns, or 'now' or 'omit'."""
        def pair(value):
            if value in ('now', 'omit'):
                return 0, UTIME_NOW if value == 'now' else UTIME_OMIT
            return divmod(value, 10**9)
        times = struct.pack('qqqq', *pair(atime), *pair(mtime))
        _checked(libc.utimensat(-100, self._path(path), times, 0x100))

    def set_mtime(self, fd, seconds):
        """Also of what is open with O_PATH only."""
        os.utime(f'/proc/self/fd/{self._open[fd]}', (seconds, seconds))

    def truncate(self, path, size):
        os.truncate(self._path(path), size)

    def ftruncate(self, fd, size):
        os.ftruncate(self._open[fd], size)

    def access(self, path, mode):
        return os.access(self._path(path), mode)

    def statvfs(self, path=''):
        s = os.statvfs(self._path(path))
        return s.f_bsize, s.f_frsize, s.f_blocks, s.f_files, s.f_namemax

    def umask(self, mask):
        os.umask(mask)

    # --- extended attributes
    def setxattr(self, path, name, value, flags=0):
        os.setxattr(self._path(path), name, value, flags, follow_symlinks=False)

    def getxattr(self, path, name):
        return os.getxattr(self._path(path), name, follow_symlinks=False)

    def listxattr(self, path):
        return sorted(os.listxattr(self._path(path), follow_symlinks=False))

    def removexattr(self, path, name):
        os.removexattr(self._path(path), name, follow_symlinks=False)

    def getxattr_into(self, path, name, size):
        buffer = ctypes.create_string_buffer(size or 1)
        return _checked(libc.lgetxattr(self._path(path), name.encode(), buffer, size))

    # --- open files
    def open(self, fd, path, flags, mode=0o644):
        assert fd not in self._open
        self._open[fd] = os.open(self._path(path), flags, mode)

    def close(self, fd):
        os.close(self._open.pop(fd))

    def close_all(self):
        for fd in list(self._open):
            self.close(fd)

    def read(self, fd, size):
        return os.read(self._open[fd], size)

    def write(self, fd, data):
        return os.write(self._open[fd], data)

    def pread(self, fd, size, offset):
        return os.pread(self._open[fd], size, offset)

    def pwrite(self, fd, data, offset):
        return os.pwrite(self._open[fd], data, offset)

    def seek(self, fd, offset, whence):
        return os.lseek(self._open[fd], offset, whence)

    def fsync(self, fd):
        os.fsync(self._open[fd])

    def fdatasync(self, fd):
        os.fdatasync(self._open[fd])

    def fallocate(self, fd, mode, offset, length):
        _checked(libc.fallocate(self._open[fd], mode, ctypes.c_long(offset), ctypes.c_long(length)))

    def copy_range(self, source, target, size, source_offset, target_offset):
        return os.copy_file_range(self._open[source], self._open[target], size, source_offset, target_offset)

    def content(self, path):
        with open(self._path(path), 'rb', buffering=0) as f:
            return f.read()

    def put(self, path, data, mode=0o644):
        fd = os.open(self._path(path), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    def map(self, fd, length):
        """Stays mapped when the descriptor is closed."""
        self._mapped = mmap.mmap(self._open[fd], length, mmap.MAP_SHARED, mmap.PROT_READ)

    def mapped(self, start, length):
        return self._mapped[start:start + length]

    def share(self, fd, length):
        """As map, and writable."""
        self._mapped = mmap.mmap(self._open[fd], length, mmap.MAP_SHARED)

    def store(self, offset, data):
        self._mapped[offset:offset + len(data)] = data

    def msync(self):
        self._mapped.flush()

    def map_write(self, fd, offset, data, length):
        with mmap.mmap(self._open[fd], length, mmap.MAP_SHARED) as m:
            m[offset:offset + len(data)] = data
            m.flush()

    def map_read(self, fd, offset, size, length):
        with mmap.mmap(self._open[fd], length, mmap.MAP_SHARED, mmap.PROT_READ) as m:
            return m[offset:offset + size]

    def map_private(self, fd, data, length):
        with mmap.mmap(self._open[fd], length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
            m[0:len(data)] = data
            return m[0:len(data) + 4]

    def read_directory_in_two(self, path, at):
        """The stream's names, and what is read again from the offset after the first `at` of them."""
        class Dirent(ctypes.Structure):
            _fields_ = [('ino', ctypes.c_ulong), ('off', ctypes.c_long), ('reclen', ctypes.c_ushort),
                        ('type', ctypes.c_ubyte), ('name', ctypes.c_char * 256)]
        libc.opendir.restype = ctypes.c_void_p
        libc.readdir.restype = ctypes.POINTER(Dirent)
        libc.telldir.restype = ctypes.c_long
        stream = ctypes.c_void_p(libc.opendir(self._path(path)))
        names, place = [], None
        while entry := libc.readdir(stream):
            names.append(entry.contents.name)
            if len(names) == at:
                place = libc.telldir(stream)
        libc.seekdir(stream, ctypes.c_long(place))
        again = []
        while entry := libc.readdir(stream):
            again.append(entry.contents.name)
        libc.closedir(stream)
        assert again == names[at:], f'from the offset after {names[at - 1]}: {again}, not {names[at:]}'
        return sorted(names)

    def set_flags(self, fd, flags):
        fcntl.fcntl(self._open[fd], fcntl.F_SETFL, flags)

    # --- locks
    def flock(self, fd, how, wait=False):
        fcntl.flock(self._open[fd], how | (0 if wait or how == fcntl.LOCK_UN else fcntl.LOCK_NB))

    def lock(self, fd, how, start, length):
        """POSIX lock, 'r', 'w' or 'u', without waiting."""
        kind = {'r': fcntl.F_RDLCK, 'w': fcntl.F_WRLCK, 'u': fcntl.F_UNLCK}[how]
        fcntl.fcntl(self._open[fd], fcntl.F_SETLK, struct.pack('hhqqi', kind, 0, start, length, 0))

    def lock_holder(self, fd, start, length):
        """What stands in the way of a write lock: kind, start, length."""
        asked = struct.pack('hhqqi', fcntl.F_WRLCK, 0, start, length, 0)
        kind, _, start, length, _ = struct.unpack('hhqqi', fcntl.fcntl(self._open[fd], fcntl.F_GETLK, asked)[:28])
        return ('free',) if kind == fcntl.F_UNLCK else (kind, start, length)

    # --- special files
    def fifo_carries(self, path, data):
        reader = os.open(self._path(path), os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open(self._path(path), os.O_WRONLY)
        try:
            os.write(writer, data)
            return os.read(reader, len(data))
        finally:
            os.close(reader)
            os.close(writer)

    def socket_carries(self, directory, name, data):
        here = os.open('.', os.O_RDONLY)
        os.chdir(self._path(directory))  # socket addresses are short
        server, client = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        try:
            server.bind(name)
            server.listen()
            client.connect(name)
            client.send(data)
            return server.accept()[0].recv(len(data))
        finally:
            os.fchdir(here)
            os.close(here)
            server.close()
            client.close()

    def execute(self, path):
        return subprocess.run([self._path(path)], capture_output=True, check=True).stdout


class Actor:
    """The test's end. `uid` and `groups` are the identity that performs the operations."""

    def __init__(self, root, uid=0, gid=None, groups=()):
        gid = uid if gid is None else gid
        self._process = subprocess.Popen([sys.executable, __file__, root, str(uid), str(gid), *map(str, groups)],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        sandbox.to_close.append(self)

    def send(self, operation, *arguments):
        pickle.dump((operation, arguments), self._process.stdin)
        self._process.stdin.flush()

    def receive(self, timeout=60):
        if not select.select([self._process.stdout], [], [], timeout * sandbox.PATIENCE)[0]:
            raise AssertionError(f'an operation does not end within {timeout} s')
        return pickle.load(self._process.stdout)

    def do(self, operation, *arguments, timeout=60):
        self.send(operation, *arguments)
        return self.receive(timeout)

    def has_answered(self):
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def kill(self):
        self._process.kill()

    def wait_ended(self):
        self._process.wait(10)

    def describe(self):
        pass

    def close(self):
        self._process.kill()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            pass  # it ends with the mount that it waits for, which is closed later
        self._process.stdin.close()
        self._process.stdout.close()


def _serve(root, uid, gid, *groups):
    os.umask(0o022)
    os.setgroups([int(g) for g in groups])
    os.setresgid(int(gid), int(gid), int(gid))
    os.setresuid(int(uid), int(uid), int(uid))
    operations = Operations(root)
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = ('ok', getattr(operations, name)(*arguments))
        except OSError as error:
            answer = ('errno', errno.errorcode.get(error.errno, error.errno))
        except Exception as error:
            answer = ('wrong', repr(error))
        pickle.dump(answer, sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == '__main__':
    _serve(*sys.argv[1:])
