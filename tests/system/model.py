"""Random operations against a simple in-memory model of a file system.

The model knows names, links, sizes, data and modes. Every outcome of the real thing, errno included, must be the
model's, whichever mount performs the operation; at the end every mount must show the model's tree.
"""

import os
import random

from actor import KEEP_SIZE, PUNCH_HOLE, RENAME_EXCHANGE, RENAME_NOREPLACE, Actor


class Node:
    def __init__(self, kind, mode, parent=None, target=None):
        self.kind, self.mode, self.parent, self.target = kind, mode, parent, target
        self.entries, self.data, self.links = {}, bytearray(), 1


class Fails(Exception):
    """The operation must fail with this errno."""


class Model:
    """The expected file system. Paths are tuples of names; methods return what the Operations of actor.py return."""

    def __init__(self):
        self.root = Node('directory', 0o755)
        self.open_nodes = {}

    def _directory(self, path):
        node = self.root
        for name in path:
            if node.kind != 'directory':
                raise Fails('ENOTDIR')
            node = node.entries.get(name)
            if node is None or node.kind == 'link':  # all links point nowhere
                raise Fails('ENOENT')
        if node.kind != 'directory':
            raise Fails('ENOTDIR')
        return node

    def _node(self, path):
        node = self._directory(path[:-1]).entries.get(path[-1])
        if node is None:
            raise Fails('ENOENT')
        return node

    def _new(self, path, node):
        parent = self._directory(path[:-1])
        if path[-1] in parent.entries:
            raise Fails('EEXIST')
        parent.entries[path[-1]] = node
        node.parent = parent
        return node

    def _is_above(self, upper, lower):
        while lower is not None:
            if lower is upper:
                return True
            lower = lower.parent
        return False

    def mkdir(self, path, mode):
        self._new(path, Node('directory', mode))

    def symlink(self, target, path):
        self._new(path, Node('link', 0o777, target=target))

    def link(self, old, new):
        node = self._node(old)
        parent = self._directory(new[:-1])
        if new[-1] in parent.entries:
            raise Fails('EEXIST')
        if node.kind == 'directory':
            raise Fails('EPERM')
        parent.entries[new[-1]] = node
        node.links += 1

    def unlink(self, path):
        if self._node(path).kind == 'directory':
            raise Fails('EISDIR')
        self._directory(path[:-1]).entries.pop(path[-1]).links -= 1

    def rmdir(self, path):
        node = self._node(path)
        if node.kind != 'directory':
            raise Fails('ENOTDIR')
        if node.entries:
            raise Fails('ENOTEMPTY')
        del self._directory(path[:-1]).entries[path[-1]]

    def rename(self, old, new, flags):
        old_parent, new_parent = self._directory(old[:-1]), self._directory(new[:-1])
        node, there = old_parent.entries.get(old[-1]), new_parent.entries.get(new[-1])
        if node is None:
            raise Fails('ENOENT')
        if there is not None and flags & RENAME_NOREPLACE:
            raise Fails('EEXIST')
        if there is None and flags & RENAME_EXCHANGE:
            raise Fails('ENOENT')
        if node.kind == 'directory' and self._is_above(node, new_parent):
            raise Fails('EINVAL')
        if there is not None and there.kind == 'directory' and self._is_above(there, old_parent):
            raise Fails('EINVAL' if flags & RENAME_EXCHANGE else 'ENOTEMPTY')
        if node is there:
            return
        if flags & RENAME_EXCHANGE:
            old_parent.entries[old[-1]], new_parent.entries[new[-1]] = there, node
            node.parent, there.parent = new_parent, old_parent
            return
        if there is not None:
            if node.kind == 'directory' and there.kind != 'directory':
                raise Fails('ENOTDIR')
            if node.kind != 'directory' and there.kind == 'directory':
                raise Fails('EISDIR')
            if there.entries:
                raise Fails('ENOTEMPTY')
            there.links -= 1
        del old_parent.entries[old[-1]]
        new_parent.entries[new[-1]] = node
        node.parent = new_parent

    def _open(self, path):
        node = self._node(path)
        if node.kind != 'file':
            raise Fails('EISDIR' if node.kind == 'directory' else 'ELOOP')
        return node

    def open(self, fd, path, flags, mode):
        if flags & os.O_CREAT:
            parent = self._directory(path[:-1])
            if path[-1] not in parent.entries:
                self._new(path, Node('file', mode))
            elif flags & os.O_EXCL:
                raise Fails('EEXIST')
        node = self._open(path)
        if flags & os.O_TRUNC:
            del node.data[:]
        self.open_nodes[fd] = node

    def close(self, fd):
        del self.open_nodes[fd]

    def pwrite(self, fd, data, offset):
        node = self.open_nodes[fd]
        if len(node.data) < offset:
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset:offset + len(data)] = data
        return len(data)

    def pread(self, fd, size, offset):
        return bytes(self.open_nodes[fd].data[offset:offset + size])

    def ftruncate(self, fd, size):
        data = self.open_nodes[fd].data
        if size < len(data):
            del data[size:]
        else:
            data.extend(bytes(size - len(data)))

    def fallocate(self, fd, mode, offset, length):
        assert mode == PUNCH_HOLE | KEEP_SIZE
        data = self.open_nodes[fd].data
        end = min(offset + length, len(data))
        if offset < end:
            data[offset:end] = bytes(end - offset)

    def _shape(self, node):
        links = node.links
        if node.kind == 'directory':
            links = 2 + sum(child.kind == 'directory' for child in node.entries.values())
        size = len(node.data) if node.kind == 'file' else len(node.target) if node.kind == 'link' else None
        return {'kind': node.kind, 'mode': oct(node.mode), 'nlink': links, 'uid': 0, 'gid': 0, 'size': size, 'rdev': None}

    def lstat(self, path):
        return self._shape(self._node(path) if path else self.root)

    def fstat(self, fd):
        return self._shape(self.open_nodes[fd])

    def chmod(self, path, mode):
        node = self._node(path)
        if node.kind == 'link':
            raise Fails('ENOENT')
        node.mode = mode

    def readlink(self, path):
        node = self._node(path)
        if node.kind != 'link':
            raise Fails('EINVAL')
        return os.fsencode(node.target)

    def list(self, path):
        return sorted(n.encode() for n in self._directory(path).entries)

    def all_paths(self):
        stack = [((), self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            stack += [(path + (name,), child) for name, child in node.entries.items()]


class Generator:
    """Draws operations: few names, so that they often meet."""

    def __init__(self, seed):
        self._random = random.Random(seed)
        self._next_fd = 0

    def path(self):
        depth = self._random.choice((1, 1, 2, 2, 3))
        return tuple(self._random.choice('abcdef') for _ in range(depth))

    def next(self, open_fds):
        r = self._random
        fd = r.choice(sorted(open_fds)) if open_fds else None
        kind = r.choice(self.NAMES if fd is None else self.NAMES + self.ON_FILES)
        if kind == 'mkdir':
            return kind, self.path(), r.choice((0o755, 0o700, 0o1777))
        if kind == 'symlink':
            return kind, 'nowhere/' + 'x' * r.randrange(9), self.path()
        if kind in ('link', 'rename'):
            flags = (r.choice((0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE)),) if kind == 'rename' else ()
            return kind, self.path(), self.path(), *flags
        if kind == 'open':
            self._next_fd += 1
            flags = os.O_RDWR | os.O_NOFOLLOW | r.choice((0, os.O_CREAT, os.O_CREAT, os.O_CREAT | os.O_EXCL,
                                                          os.O_CREAT | os.O_TRUNC))
            return kind, self._next_fd, self.path(), flags, r.choice((0o644, 0o600))
        if kind == 'chmod':
            return kind, self.path(), r.choice((0o600, 0o644, 0o755, 0o400))
        if kind == 'pwrite':
            return kind, fd, r.randbytes(r.choice((1, 100, 5000, 40000))), r.randrange(60000)
        if kind == 'pread':
            return kind, fd, r.choice((10, 5000, 100000)), r.randrange(80000)
        if kind == 'ftruncate':
            return kind, fd, r.randrange(90000)
        if kind == 'fallocate':
            return kind, fd, PUNCH_HOLE | KEEP_SIZE, r.randrange(60000), r.randrange(1, 30000)
        if kind in ('fstat', 'close'):
            return kind, fd
        return kind, self.path()

    NAMES = ('mkdir', 'mkdir', 'symlink', 'link', 'rename', 'rename', 'rename', 'open', 'open', 'open', 'chmod', 'unlink',
             'unlink', 'rmdir', 'lstat', 'lstat', 'list', 'list', 'readlink')
    ON_FILES = ('pwrite', 'pwrite', 'pwrite', 'pread', 'pread', 'pread', 'ftruncate', 'fallocate', 'fstat', 'close')


def _real(arguments):
    return tuple('/'.join(a) if isinstance(a, tuple) else a for a in arguments)


def random_test(roots, seed, steps, between=None):
    """Performs `steps` random operations on mounts drawn at random. `between(step)` may hand over, cut, restart."""
    print(f'random operations, seed {seed}', flush=True)
    actors = [Actor(root) for root in roots]
    for actor in actors:
        actor.do('umask', 0)
    model, generator, chooser = Model(), Generator(seed), random.Random(-seed)
    holder = {}  # open file -> the actor that has it open
    history = []
    for step in range(steps):
        if between:
            between(step)
        operation, *arguments = generator.next(model.open_nodes)
        on_file = operation in Generator.ON_FILES
        number = holder[arguments[0]] if on_file else chooser.randrange(len(actors))
        try:
            wanted = 'ok', getattr(model, operation)(*arguments)
        except Fails as reason:
            wanted = 'errno', str(reason)
        if operation == 'open' and wanted[0] == 'ok':
            holder[arguments[0]] = number
        if operation == 'rename' and len(actors) > 1:
            # As mv(1) does. Without it the kernel may answer ESTALE by itself: holding the rename lock it cannot attach
            # a directory, looked up at its new place, that another machine moved (__d_unalias; NFS does the same).
            for path in arguments[:2]:
                actors[number].do('lstat', '/'.join(path))
        found = actors[number].do(operation, *_real(arguments))
        history.append(f'{step}: mount {number}: {operation}{_shortened(arguments)} -> {wanted[0]} {_shortened(wanted[1:])}')
        assert found == wanted, (f'seed {seed}, step {step}: {operation}{_shortened(arguments)} on mount {number} gave '
                                 f'{_shortened(found)}, the model says {_shortened(wanted)}; before:\n  '
                                 + '\n  '.join(history[-12:]))
    for number, actor in enumerate(actors):
        _compare_tree(model, actor, f'seed {seed}, mount {number}')
        actor.do('close_all')


def _shortened(value):
    text = repr(value)
    return text if len(text) < 200 else text[:150] + '...'


def _compare_tree(model, actor, where):
    for path, node in model.all_paths():
        name = '/'.join(path)
        found = actor.do('lstat', name)
        assert found[0] == 'ok', f'{where}: {name}: {found}'
        if path:  # the root was there before
            assert found[1] == model._shape(node), f'{where}: {name}: {found[1]}, the model says {model._shape(node)}'
        if node.kind == 'directory':
            assert actor.do('list', name)[1] == model.list(path), f'{where}: {name} lists other names'
        elif node.kind == 'file':
            assert actor.do('content', name)[1] == bytes(node.data), f'{where}: {name} has other bytes'
