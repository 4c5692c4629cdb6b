"""Every file operation on a mount and on plain ext4 side by side: errno and result must be the same.

A scenario calls `do(operation, ...)`, which performs it on both sides and compares. Left out of the comparison: inode
numbers, blocks, ctime values (whether they move is compared), sizes of directories.
"""

import fcntl
import os
import stat
import struct
import traceback

from actor import KEEP_SIZE, PUNCH_HOLE, RENAME_EXCHANGE, RENAME_NOREPLACE, ZERO_RANGE, Actor

USER, OTHER, SHARED_GROUP = 65534, 4711, 5005
R, W, RW = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR


class Sides:
    """The two roots, with actors of each identity on both."""

    def __init__(self, tested, plain):
        self._roots = tested, plain
        self._actors = {}
        self.problems = []

    def _pair(self, who):
        if who not in self._actors:
            uid, groups = {'root': (0, ()), 'user': (USER, (SHARED_GROUP,)), 'other': (OTHER, ()),
                           'second': (0, ()), 'user-second': (USER, ())}[who]
            self._actors[who] = [Actor(root, uid, groups=groups) for root in self._roots]
        return self._actors[who]

    def do(self, operation, *arguments, who='root'):
        results = [actor.do(operation, *arguments) for actor in self._pair(who)]
        same = results[0] == results[1]
        if operation.startswith('remember'):
            same = True
        if not same:
            self.problems.append(f'{operation}{arguments} as {who}: {results[0]}, plain ext4: {results[1]}')
        assert results[0][0] != 'wrong' or not same, f'{operation}{arguments}: {results[0]}'
        return results[1]

    def close(self):
        for pair in self._actors.values():
            for actor in pair:
                actor.do('close_all')


def create_and_remove(do):
    do('mkdir', 'a', 0o751)
    do('mkdir', 'a')
    do('mkdir', 'missing/a')
    do('stat', 'a')
    do('open', 'f', 'a/f', NEW, 0o640)
    do('open', 'g', 'a/f', NEW)
    do('fstat', 'f')
    do('open', 'g', 'a/f', R | os.O_DIRECTORY)
    do('open', 'g', 'a', W)
    do('open', 'g', 'a', R | os.O_CREAT)
    do('open', 'g', 'a/none', R)
    do('open', 'g', 'a/f/x', R)
    do('mkdir', 'a/f/x')
    do('rmdir', 'a')
    do('rmdir', 'a/f')
    do('unlink', 'a')
    do('unlink', 'a/none')
    do('rmdir', 'a/none')
    do('rmdir', 'a/.')
    do('mkdir', '.')
    do('stat', 'a')
    do('unlink', 'a/f')
    do('fstat', 'f')
    do('write', 'f', b'still open')
    do('pread', 'f', 100, 0)
    do('fstat', 'f')
    do('rmdir', 'a')
    do('close', 'f')
    for mask in (0, 0o077, 0o027):
        do('umask', mask)
        do('open', 'm', f'masked{mask}', NEW, 0o666)
        do('close', 'm')
        do('mkdir', f'maskedd{mask}', 0o2777)
        do('lstat', f'masked{mask}')
        do('lstat', f'maskedd{mask}')
    do('umask', 0o022)


def names(do):
    for name in (b'x' * 255, b'x' * 256, b'\xff\xfe not utf-8', b'new\nline', ' ', '...', '\u00e4\u20ac', '*?"\\'):
        do('put', name, b'1')
        do('lstat', name)
    do('list')
    do('list_types')
    do('make_deep', '', 'd' * 200, 30)


def special_files(do):
    do('mknod', 'fifo', stat.S_IFIFO | 0o640)
    do('mknod', 'socket', stat.S_IFSOCK | 0o600)
    do('mknod', 'null', stat.S_IFCHR | 0o666, os.makedev(1, 3))
    do('mknod', 'loop', stat.S_IFBLK | 0o600, os.makedev(7, 200))
    do('mknod', 'regular', stat.S_IFREG | 0o604)
    do('mknod', 'fifo', stat.S_IFIFO | 0o640)
    for name in ('fifo', 'socket', 'null', 'loop', 'regular'):
        do('lstat', name)
    do('list_types')
    do('fifo_carries', 'fifo', b'through')
    do('socket_carries', '', 'bound', b'through')
    do('lstat', 'bound')
    do('put', 'null', b'swallowed')
    do('mknod', 'mine', stat.S_IFCHR | 0o666, os.makedev(1, 3), who='user')
    do('mknod', 'mine', stat.S_IFIFO | 0o666, who='user')
    do('lstat', 'mine')
    do('put', 'script', b'#!/bin/sh\necho ran\n', 0o755)
    do('execute', 'script')
    do('put', 'plain', b'#!/bin/sh\necho ran\n', 0o644)
    do('execute', 'plain')


def symbolic_links(do):
    do('symlink', 'target', 'l')
    do('symlink', 'x', 'l')
    do('lstat', 'l')
    do('readlink', 'l')
    do('stat', 'l')
    do('put', 'target', b'1234')
    do('stat', 'l')
    do('content', 'l')
    do('readlink', 'target')
    do('open', 'f', 'l', R | os.O_NOFOLLOW)
    do('open', 'f', 'l', NEW)
    do('symlink', 'loop2', 'loop1')
    do('symlink', 'loop1', 'loop2')
    do('stat', 'loop1')
    do('symlink', 'y' * 4095, 'long')
    do('readlink', 'long')
    do('symlink', '', 'empty')
    do('symlink', b'\xff', 'bytes')
    do('list_types')
    do('chown', 'l', 12, 13)
    do('lstat', 'l')
    do('lstat', 'target')
    do('link', 'l', 'l-again')
    do('lstat', 'l-again')
    do('unlink', 'l')
    do('readlink', 'l-again')


def hard_links(do):
    do('put', 'a', b'one')
    do('mkdir', 'd')
    do('link', 'a', 'd/b')
    do('link', 'a', 'd/b')
    do('link', 'd', 'e')
    do('link', 'none', 'e')
    do('same_inode', 'a', 'd/b')
    do('stat', 'a')
    do('put', 'd/b', b'twelve')
    do('content', 'a')
    do('chmod', 'd/b', 0o600)
    do('stat', 'a')
    do('rename', 'a', 'd/b')
    do('list')
    do('list', 'd')
    do('unlink', 'a')
    do('stat', 'd/b')


def renames(do):
    for name in ('d1', 'd1/sub', 'd2', 'd3', 'd3/full'):
        do('mkdir', name)
    do('put', 'f1', b'1')
    do('put', 'f2', b'22')
    do('rename', 'f1', 'none/f1')
    do('rename', 'none', 'f3')
    do('rename', 'd1', 'd1/sub/x')
    do('rename', 'd1', 'd3')
    do('rename', 'd1', 'd2')
    do('rename', 'f1', 'd2')
    do('rename', 'd2', 'f1')
    do('rename', 'f1', 'f2', RENAME_NOREPLACE)
    do('rename', 'f1', 'f3', RENAME_NOREPLACE)
    do('rename', 'f3', 'f2', RENAME_EXCHANGE)
    do('content', 'f2')
    do('rename', 'f2', 'none', RENAME_EXCHANGE)
    do('rename', 'f2', 'd3', RENAME_EXCHANGE)
    do('list_types')
    do('rename', 'd2', 'd2/sub', RENAME_EXCHANGE)
    do('rename', 'f3', 'd2', RENAME_EXCHANGE | RENAME_NOREPLACE)
    do('rename', 'f3', 'f3')
    do('rename', 'f3', 'moved' * 60)
    do('rename', '.', 'x')
    do('open', 'f', 'f3', RW)
    do('rename', 'f3', 'f4')
    do('write', 'f', b'renamed while open')
    do('content', 'f4')
    do('put', 'f5', b'5')
    do('open', 'g', 'f5', R)
    do('rename', 'f4', 'f5')
    do('read', 'g', 100)
    do('fstat', 'g')
    do('content', 'f5')
    do('list')
    do('stat', 'd2')
    do('stat', '')


def reading_and_writing(do):
    do('open', 'f', 'f', NEW)
    do('write', 'f', b'hello world')
    do('read', 'f', 10)
    do('seek', 'f', 0, os.SEEK_SET)
    do('read', 'f', 5)
    do('seek', 'f', -3, os.SEEK_END)
    do('read', 'f', 50)
    do('seek', 'f', -1, os.SEEK_SET)
    do('seek', 'f', 100000, os.SEEK_SET)
    do('write', 'f', b'far')
    do('stat', 'f')
    do('pread', 'f', 16, 99990)
    do('pread', 'f', 10, 1 << 40)
    do('pwrite', 'f', b'x', 1 << 50)
    do('pwrite', 'f', b'', 5)
    do('open', 'r', 'f', R)
    do('write', 'r', b'x')
    do('ftruncate', 'r', 0)
    do('open', 'w', 'f', W)
    do('read', 'w', 1)
    do('open', 't', 'f', W | os.O_TRUNC)
    do('fstat', 'f')
    do('pwrite', 'f', bytes(range(256)) * 8192, 4095)
    do('pread', 'f', 3 << 20, 0)
    do('fsync', 'f')
    do('fdatasync', 'f')
    do('fsync', 'r')
    do('mkdir', 'd')
    do('open', 'd', 'd', R | os.O_DIRECTORY)
    do('fsync', 'd')
    do('read', 'd', 10)
    do('open', 'p', 'f', os.O_PATH)
    do('fstat', 'p')
    do('read', 'p', 1)


def appending(do):
    do('put', 'f', b'start ')
    do('open', 'a', 'f', W | os.O_APPEND)
    do('open', 'b', 'f', RW | os.O_APPEND)
    do('open', 'c', 'f', RW)
    do('write', 'a', b'one ')
    do('write', 'b', b'two ')
    do('pwrite', 'c', b'START', 0)
    do('write', 'a', b'three ')
    do('pwrite', 'a', b'at the end all the same ', 2)
    do('seek', 'b', 0, os.SEEK_CUR)
    do('ftruncate', 'c', 3)
    do('write', 'b', b'after')
    do('content', 'f')
    do('stat', 'f')


def truncation(do):
    do('put', 'f', b'0123456789' * 1000)
    do('truncate', 'f', 5000)
    do('truncate', 'f', 12000)
    do('content', 'f')
    do('truncate', 'f', -1)
    do('truncate', 'none', 1)
    do('truncate', '', 1)
    do('truncate', 'f', 1 << 50)
    do('open', 'f', 'f', RW)
    do('ftruncate', 'f', 4097)
    do('ftruncate', 'f', 9000)
    do('pread', 'f', 10000, 0)
    do('ftruncate', 'f', 0)
    do('stat', 'f')


def holes(do):
    do('open', 'f', 'f', NEW)
    do('pwrite', 'f', b'a' * 65536, 0)
    do('fallocate', 'f', PUNCH_HOLE | KEEP_SIZE, 8192, 16384)
    do('fallocate', 'f', PUNCH_HOLE, 8192, 16384)
    do('fallocate', 'f', ZERO_RANGE, 30000, 5000)
    do('fallocate', 'f', ZERO_RANGE, 60000, 10000)
    do('stat', 'f')
    do('fallocate', 'f', ZERO_RANGE | KEEP_SIZE, 69000, 10000)
    do('fallocate', 'f', 0, 0, 100000)
    do('fallocate', 'f', KEEP_SIZE, 0, 200000)
    do('fallocate', 'f', 0, 0, 0)
    do('fallocate', 'f', 0, -1, 10)
    do('fallocate', 'f', 0, 1 << 50, 10)
    do('stat', 'f')
    do('content', 'f')
    do('ftruncate', 'f', 1 << 20)
    for offset in (0, 1, 8192, 10000, 24576, 70000, 1 << 19, 1 << 20, 1 << 21):
        do('seek', 'f', offset, os.SEEK_DATA)
        do('seek', 'f', offset, os.SEEK_HOLE)
    do('open', 'r', 'f', R)
    do('fallocate', 'r', 0, 0, 10)


def copying(do):
    do('open', 'f', 'f', NEW)
    do('open', 'g', 'g', NEW)
    do('pwrite', 'f', bytes(range(256)) * 1000, 0)
    do('copy_range', 'f', 'g', 100000, 50, 3)
    do('copy_range', 'f', 'g', 1 << 20, 200000, 150000)
    do('copy_range', 'f', 'g', 10, 1 << 20, 0)
    do('copy_range', 'f', 'f', 1000, 0, 100000)
    do('copy_range', 'f', 'f', 1000, 0, 500)
    do('content', 'f')
    do('content', 'g')
    do('open', 'r', 'g', R)
    do('copy_range', 'f', 'r', 10, 0, 0)
    do('open', 'a', 'g', W | os.O_APPEND)
    do('copy_range', 'f', 'a', 10, 0, 0)


def mapping(do):
    do('open', 'f', 'f', NEW)
    do('ftruncate', 'f', 20000)
    do('map_write', 'f', 5000, b'through the mapping', 20000)
    do('pread', 'f', 30, 4995)
    do('pwrite', 'f', b'by write', 100)
    do('map_read', 'f', 98, 12, 20000)
    do('map_private', 'f', b'only mine', 20000)
    do('pread', 'f', 9, 0)
    do('open', 'r', 'f', R)
    do('map_write', 'r', 0, b'x', 100)
    do('content', 'f')


def attributes(do):
    do('put', 'f', b'x')
    do('mkdir', 'd')
    for mode in (0, 0o7777, 0o644, 0o4755, 0o2755, 0o1644):
        do('chmod', 'f', mode)
        do('stat', 'f')
        do('chmod', 'd', mode)
        do('stat', 'd')
    do('chmod', 'd', 0o755)
    do('chmod', 'none', 0o644)
    for mode in (0o6755, 0o6745):
        do('chmod', 'f', mode)
        do('chown', 'f', 7, 8)
        do('stat', 'f')
        do('chmod', 'f', mode)
        do('chown', 'f', -1, 9)
        do('stat', 'f')
        do('chmod', 'f', mode)
        do('chown', 'f', -1, -1)
        do('stat', 'f')
    do('chown', 'none', 1, 1)
    do('open', 'o', 'f', R)
    do('fchmod', 'o', 0o611)
    do('fstat', 'o')


def times(do):
    do('put', 'f', b'x')
    do('utimens', 'f', 10**18 + 1, 2 * 10**18 + 999_999_999)
    do('times', 'f')
    do('utimens', 'f', 'omit', 5)
    do('times', 'f')
    do('utimens', 'f', 7, 'omit')
    do('times', 'f')
    do('utimens', 'f', 'omit', 'omit')
    do('times', 'f')
    do('utimens', 'f', -10**9, -10**9)
    do('times', 'f')
    do('mkdir', 'd')
    do('symlink', 'f', 'l')
    do('utimens', 'l', 3, 4)
    do('times', 'l')
    do('utimens', 'd', 3, 4)
    do('mtime', 'd')
    do('open', 'f', 'f', RW)
    do('mkdir', 'e')
    changes = [('f', 'utimens', 'f', 'now', 'now'), ('f', 'pwrite', 'f', b'z', 0), ('f', 'ftruncate', 'f', 100),
               ('f', 'truncate', 'f', 100), ('f', 'pread', 'f', 1, 0), ('f', 'chmod', 'f', 0o600),
               ('f', 'link', 'f', 'd/f'), ('d', 'rename', 'd/f', 'd/g'), ('f', 'rename', 'd/g', 'e/g'),
               ('d', 'mkdir', 'd/x'), ('d', 'rmdir', 'd/x'), ('d', 'chmod', 'd', 0o700), ('f', 'unlink', 'e/g'),
               ('f', 'setxattr', 'f', 'user.x', b'1'), ('f', 'removexattr', 'f', 'user.x'),
               ('f', 'fallocate', 'f', PUNCH_HOLE | KEEP_SIZE, 0, 50), ('d', 'symlink', 'x', 'd/l'),
               ('f', 'chown', 'f', 0, 0), ('f', 'fallocate', 'f', 0, 0, 5000), ('d', 'list', 'd')]
    for watched, *operation in changes:
        do('remember_times', watched)
        do(*operation)
        do('which_times_moved', watched)


def extended_attributes(do):
    do('put', 'f', b'x')
    do('symlink', 'f', 'l')
    do('mkdir', 'd')
    do('getxattr', 'f', 'user.none')
    do('listxattr', 'f')
    do('setxattr', 'f', 'user.a', b'value\0with zero')
    do('setxattr', 'f', 'user.a', b'2', os.XATTR_CREATE)
    do('setxattr', 'f', 'user.b', b'2', os.XATTR_REPLACE)
    do('setxattr', 'f', 'user.b', b'', os.XATTR_CREATE)
    do('setxattr', 'f', 'user.c', b'c' * 2000)
    do('setxattr', 'f', 'user.big', b'c' * 70000)
    do('setxattr', 'f', 'user.' + 'n' * 255, b'x')
    do('setxattr', 'f', 'trusted.t', b't')
    do('setxattr', 'f', 'nospace.x', b't')
    do('setxattr', 'l', 'user.x', b't')
    do('setxattr', 'd', 'user.d', b'd')
    do('listxattr', 'f')
    do('listxattr', 'd')
    do('listxattr', 'f', who='user')
    for name in ('user.a', 'user.b', 'user.c', 'trusted.t'):
        do('getxattr', 'f', name)
    do('getxattr_into', 'f', 'user.c', 0)
    do('getxattr_into', 'f', 'user.c', 10)
    do('removexattr', 'f', 'user.a')
    do('removexattr', 'f', 'user.a')
    do('listxattr', 'f')
    do('chmod', 'f', 0o666)
    do('setxattr', 'f', 'user.from-user', b'1', who='user')
    do('setxattr', 'f', 'trusted.from-user', b'1', who='user')
    do('chmod', 'f', 0o644)
    do('setxattr', 'f', 'user.from-user', b'1', who='other')
    capability = struct.pack('<IIIII', 0x02000001, 1 << 10, 0, 0, 0)
    do('setxattr', 'f', 'security.capability', capability)
    do('getxattr', 'f', 'security.capability')
    do('open', 'f', 'f', RW)
    do('write', 'f', b'drops it')
    do('getxattr', 'f', 'security.capability')


def _acl(*entries):
    """Tag 1 owner, 2 user, 4 owning group, 8 group, 16 mask, 32 others."""
    return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', tag, mode, who) for tag, mode, who in entries)


def access_lists(do):
    nobody = 0xffffffff
    do('put', 'f', b'secret', 0o600)
    do('content', 'f', who='user')
    do('setxattr', 'f', 'system.posix_acl_access',
       _acl((1, 6, nobody), (2, 4, USER), (4, 0, nobody), (16, 4, nobody), (32, 0, nobody)))
    do('stat', 'f')
    do('content', 'f', who='user')
    do('content', 'f', who='other')
    do('access', 'f', os.R_OK, who='user')
    do('access', 'f', os.W_OK, who='user')
    do('chmod', 'f', 0o600)
    do('getxattr', 'f', 'system.posix_acl_access')
    do('content', 'f', who='user')
    do('mkdir', 'd', 0o755)
    default = _acl((1, 7, nobody), (2, 5, USER), (4, 5, nobody), (16, 5, nobody), (32, 0, nobody))
    do('setxattr', 'd', 'system.posix_acl_default', default)
    do('umask', 0o077)
    do('put', 'd/f', b'inherits', 0o666)
    do('mkdir', 'd/d', 0o777)
    do('mknod', 'd/fifo', stat.S_IFIFO | 0o666)
    do('umask', 0o022)
    for name in ('d/f', 'd/d', 'd/fifo'):
        do('lstat', name)
        do('getxattr', name, 'system.posix_acl_access')
        do('getxattr', name, 'system.posix_acl_default')
    do('content', 'd/f', who='user')
    do('removexattr', 'd', 'system.posix_acl_default')
    do('setxattr', 'f', 'system.posix_acl_access', b'nonsense')


def directories(do):
    do('mkdir', 'd')
    for i in range(300):
        do('put', f'd/entry-{i}', b'')
    do('list', 'd')
    do('list_types', 'd')
    do('read_directory_in_two', 'd', 150)
    do('read_directory_in_two', 'd', 3)
    for i in range(0, 300, 2):
        do('unlink', f'd/entry-{i}')
    do('list', 'd')
    do('mkdir', 'd/x')
    do('mkdir', 'd/y')
    do('stat', 'd')
    do('list', 'none')
    do('list', 'd/entry-1')
    do('open', 'gone', 'd/x', R | os.O_DIRECTORY)
    do('rmdir', 'd/x')
    do('fstat', 'gone')
    do('statvfs')
    do('statvfs', 'd')


def locks(do):
    do('put', 'f', b'0' * 100, 0o666)
    for who in ('root', 'second'):
        do('open', 'f', 'f', RW, who=who)
    do('lock', 'f', 'w', 10, 20)
    do('lock', 'f', 'w', 20, 5, who='second')
    do('lock', 'f', 'r', 29, 1, who='second')
    do('lock', 'f', 'w', 30, 5, who='second')
    do('lock_holder', 'f', 0, 0, who='second')
    do('lock_holder', 'f', 25, 50)
    do('lock', 'f', 'u', 15, 5)
    do('lock', 'f', 'w', 15, 5, who='second')
    do('lock_holder', 'f', 11, 2, who='second')
    do('lock', 'f', 'r', 10, 5)
    do('lock', 'f', 'r', 10, 5, who='second')
    do('lock', 'f', 'w', 10, 5)
    do('open', 'again', 'f', R)
    do('close', 'again')  # drops all POSIX locks of the process
    do('lock', 'f', 'w', 0, 9, who='second')
    do('lock_holder', 'f', 0, 0)
    do('open', 'r', 'f', R)
    do('lock', 'r', 'w', 90, 1)
    do('flock', 'f', fcntl.LOCK_SH)
    do('flock', 'f', fcntl.LOCK_SH, who='second')
    do('flock', 'f', fcntl.LOCK_EX)
    do('flock', 'f', fcntl.LOCK_UN, who='second')
    do('flock', 'f', fcntl.LOCK_EX)
    do('flock', 'f', fcntl.LOCK_SH, who='second')
    do('flock', 'r', fcntl.LOCK_SH)
    do('close', 'f')
    do('flock', 'f', fcntl.LOCK_EX, who='second')


def permissions(do):
    do('mkdir', 'open', 0o755)
    do('chmod', 'open', 0o777)
    do('mkdir', 'closed', 0o700)
    do('put', 'closed/f', b'x', 0o666)
    do('put', 'readable', b'text', 0o644)
    do('put', 'write-only', b'text', 0o622)
    for who in ('user', 'other'):
        do('stat', 'closed', who=who)
        do('stat', 'closed/f', who=who)
        do('list', 'closed', who=who)
        do('content', 'readable', who=who)
        do('put', 'readable', b'no', who=who)
        do('truncate', 'readable', 0, who=who)
        do('content', 'write-only', who=who)
        do('open', 'w', 'write-only', W | os.O_APPEND, who=who)
        do('write', 'w', b'more', who=who)
        for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK):
            for name in ('readable', 'write-only', 'closed', 'open', 'closed/f'):
                do('access', name, mode, who=who)
        do('mkdir', 'new', who=who)
        do('put', 'new', b'', who=who)
        do('unlink', 'readable', who=who)
        do('rename', 'readable', 'open/moved', who=who)
        do('link', 'readable', 'open/linked', who=who)
        do('chmod', 'readable', 0o777, who=who)
        do('chown', 'readable', USER, USER, who=who)
        do('utimens', 'readable', 'now', 'now', who=who)
        do('utimens', 'write-only', 'now', 'now', who=who)
        do('utimens', 'write-only', 5, 5, who=who)
        do('setxattr', 'readable', 'user.x', b'1', who=who)
    do('list', 'open')
    do('content', 'write-only')


def ownership(do):
    for mode in (0o6666, 0o6676, 0o2666, 0o4666):
        do('put', 'privileged', b'ends with the first write of somebody else')
        do('chmod', 'privileged', mode)
        do('stat', 'privileged')
        do('open', 'p', 'privileged', RW, who='user')
        do('write', 'p', b'!', who='user')
        do('stat', 'privileged')
        do('chmod', 'privileged', mode)
        do('fallocate', 'p', 0, 0, 5000, who='user')
        do('stat', 'privileged')
        do('close', 'p', who='user')
        do('unlink', 'privileged')
    do('mkdir', 'shared', 0o755)
    do('chown', 'shared', 0, SHARED_GROUP)
    do('chmod', 'shared', 0o2775)
    do('mkdir', 'sticky', 0o755)
    do('chmod', 'sticky', 0o1777)
    do('put', 'shared/mine', b'1', 0o666, who='user')
    do('mkdir', 'shared/dir', 0o777, who='user')
    do('symlink', 'x', 'shared/link', who='user')
    do('mknod', 'shared/fifo', stat.S_IFIFO | 0o666, who='user')
    for name in ('mine', 'dir', 'link', 'fifo'):
        do('lstat', f'shared/{name}')
    do('put', 'shared/theirs', b'1', who='other')
    do('put', 'sticky/mine', b'1', 0o666, who='user')
    do('put', 'sticky/theirs', b'1', 0o666, who='other')
    do('lstat', 'sticky/mine')
    do('unlink', 'sticky/mine', who='other')
    do('rename', 'sticky/mine', 'sticky/x', who='other')
    do('rename', 'sticky/theirs', 'sticky/mine', who='other')
    do('chown', 'sticky/mine', -1, SHARED_GROUP, who='user')
    do('chown', 'sticky/mine', -1, 1, who='user')
    do('chown', 'sticky/mine', OTHER, -1, who='user')
    do('lstat', 'sticky/mine')
    do('chmod', 'sticky/mine', 0o2755, who='user')
    do('lstat', 'sticky/mine')
    do('chown', 'sticky/theirs', -1, 1)
    do('chmod', 'sticky/theirs', 0o2755, who='other')
    do('lstat', 'sticky/theirs')
    do('put', 'sticky/program', b'1', who='user')
    do('chmod', 'sticky/program', 0o6777, who='user')
    do('open', 'p', 'sticky/program', W, who='other')
    do('write', 'p', b'2', who='other')
    do('lstat', 'sticky/program')
    do('chmod', 'sticky/program', 0o6777, who='user')
    do('ftruncate', 'p', 0, who='other')
    do('lstat', 'sticky/program')
    do('chmod', 'sticky/program', 0o6777, who='user')
    do('fallocate', 'p', 0, 0, 100, who='other')
    do('lstat', 'sticky/program')
    do('utimens', 'sticky/mine', 5, 6, who='user')
    do('times', 'sticky/mine')
    do('put', 'sticky/none', b'kept open', 0o600, who='user')
    do('open', 'k', 'sticky/none', RW, who='user')
    do('chmod', 'sticky/none', 0, who='user')
    do('read', 'k', 20, who='user')
    do('write', 'k', b'!', who='user')
    do('open', 'k2', 'sticky/none', R, who='user')
    do('fchmod', 'k', 0o640, who='user')
    do('lstat', 'sticky/none')


SCENARIOS = [create_and_remove, names, special_files, symbolic_links, hard_links, renames, reading_and_writing,
             appending, truncation, holes, copying, mapping, attributes, times, extended_attributes, access_lists,
             directories, locks, permissions, ownership]


def compare(tested, plain, only=None):
    """Runs all scenarios in fresh directories below both roots; raises with every difference."""
    problems = []
    for scenario in SCENARIOS:
        if only and scenario.__name__ not in only:
            continue
        roots = [f'{root}/{scenario.__name__}' for root in (tested, plain)]
        for root in roots:
            os.makedirs(root)
            os.chmod(root, 0o777)
        sides = Sides(*roots)
        try:
            scenario(sides.do)
            sides.close()
        except Exception:
            sides.problems.append(traceback.format_exc(limit=-3))
        problems += [f'{scenario.__name__}: {problem}' for problem in sides.problems]
    if problems:
        raise AssertionError(f'{len(problems)} differences from plain ext4:\n  ' + '\n  '.join(map(_short, problems)))


def _short(text):
    return text if len(text) < 500 else text[:250] + ' ... ' + text[-250:]
