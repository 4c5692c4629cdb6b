"""Processes that take and release locks of all kinds on counters, from several mounts. What they have is told on a board in
shared memory: so it is seen at once if a lock is given to two, a change under a lock is lost, or a counter is read that is
older than the lock. Run as a program it is one such process."""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import time

import sandbox

libc = ctypes.CDLL(None, use_errno=True)
FLOCK, POSIX, OFD = 'flock', 'posix', 'ofd'
CELLS = [(FLOCK, 'f0', 0), (FLOCK, 'f1', 0), (POSIX, 'p', 0), (POSIX, 'p', 1), (POSIX, 'p', 2), (OFD, 'o', 0), (OFD, 'o', 1)]
FILES = sorted({name for _, name, _ in CELLS})
WIDTH = 64  # bytes of a cell
OFD_SETLK, OFD_SETLKW = 37, 38
SLOT = struct.Struct('<QQQQ')  # the counter, whether one more is possible, who has it exclusively, how many share it
BOARD = 4096
STOP = BOARD - 1


class Gone(Exception):
    """The mount of this process has ended."""


class Board:
    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self.fd, BOARD)
        self.memory = mmap.mmap(self.fd, BOARD)

    def stopped(self):
        return self.memory[STOP] != 0

    @contextlib.contextmanager
    def slot(self, cell):
        fcntl.lockf(self.fd, fcntl.LOCK_EX)
        try:
            values = list(SLOT.unpack_from(self.memory, cell * SLOT.size))
            yield values
            SLOT.pack_into(self.memory, cell * SLOT.size, *values)
        finally:
            fcntl.lockf(self.fd, fcntl.LOCK_UN)


class Locker:
    """One process on one mount."""

    def __init__(self, root, board, seed):
        self.random = random.Random(seed)
        self.board = Board(board)
        self.root = int(root)
        self.seed = seed
        self.granted = self.alarms = self.deadlocks = 0
        signal.signal(signal.SIGALRM, lambda *_: None)

    def open(self, name, flags=os.O_RDWR):
        return os.open(name, flags, 0o600, dir_fd=self.root)

    def run(self):
        try:
            while not self.board.stopped():
                self.random.choices((self.hold, self.nameless, self.killed), (20, 2, 1))[0]()
                time.sleep(self.random.choice((0, 0, 0.002, 0.02)))
        except OSError as error:
            try:
                os.fstat(self.root)
                os.listdir(self.root)
            except OSError:
                raise Gone from error
            raise

    # ---- locks

    @staticmethod
    def ask(fd, kind, index, mode, wait):
        """mode: a type of fcntl(2). Not by Python, which would go on after a signal."""
        if kind == FLOCK:
            flock = {fcntl.F_RDLCK: fcntl.LOCK_SH, fcntl.F_WRLCK: fcntl.LOCK_EX, fcntl.F_UNLCK: fcntl.LOCK_UN}[mode]
            result = libc.flock(fd, flock | (0 if wait else fcntl.LOCK_NB))
        else:
            command = {POSIX: (fcntl.F_SETLK, fcntl.F_SETLKW), OFD: (OFD_SETLK, OFD_SETLKW)}[kind][wait]
            result = libc.fcntl(fd, command, struct.pack('hhqqi4x', mode, os.SEEK_SET, index * WIDTH, WIDTH, 0))
        if result != 0:
            raise OSError(ctypes.get_errno(), f'{kind} {index} {mode}')

    def take(self, fd, kind, index, mode):
        """Whether it was granted."""
        how = self.random.choice(('try', 'wait', 'wait', 'alarm', 'alarm'))
        try:
            if how == 'alarm':  # again and again, since it may come before the call
                signal.setitimer(signal.ITIMER_REAL, self.random.choice((0.001, 0.01, 0.1, 0.5)), 0.01)
            self.ask(fd, kind, index, mode, how != 'try')
            self.granted += 1
            return True
        except OSError as error:
            if error.errno == errno.EINTR and how == 'alarm':
                self.alarms += 1
            elif error.errno == errno.EDEADLK and how != 'try' and kind != FLOCK:
                self.deadlocks += 1
            elif error.errno not in (errno.EAGAIN, errno.EACCES) or how != 'try':
                raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    def hold(self):
        cell = self.random.randrange(len(CELLS))
        kind, name, index = CELLS[cell]
        fd = self.open(name)
        try:
            mode = self.random.choice((fcntl.F_RDLCK, fcntl.F_WRLCK))
            had = None
            while self.take(fd, kind, index, mode):
                had = self.use(cell, fd, index, mode, had)
                if self.random.random() < 0.7:
                    break
                other = fcntl.F_RDLCK if mode == fcntl.F_WRLCK else fcntl.F_WRLCK
                if kind == FLOCK:
                    had = None  # the old lock is given up first
                mode = other
            self.give_up(fd, kind, name, index)
        finally:
            os.close(fd)

    def give_up(self, fd, kind, name, index):
        how = self.random.choice(('unlock', 'close', 'other'))
        if how == 'unlock':
            self.ask(fd, kind, index, fcntl.F_UNLCK, False)
        elif how == 'other' and kind == POSIX:
            os.close(self.open(name))  # any descriptor of the file
        elif how == 'other' and kind == FLOCK:
            copy = os.dup(fd)
            fcntl.flock(copy, fcntl.LOCK_UN)
            os.close(copy)

    def use(self, cell, fd, index, mode, had):
        """With the lock. `had`: the counter as it was when this process had the lock the last time, if it has kept it."""
        exclusive = mode == fcntl.F_WRLCK
        with self.board.slot(cell) as slot:
            assert slot[2] == 0, f'{CELLS[cell]} is given to {os.getpid()}, and {slot[2]} has it exclusively'
            assert not exclusive or slot[3] == 0, f'{CELLS[cell]} is given exclusively, and {slot[3]} share it'
            slot[2 + (not exclusive)] = os.getpid() if exclusive else slot[3] + 1
        doubt = 0
        try:
            value = self.look(cell, fd, index)
            assert had in (None, value), f'{CELLS[cell]} was {had}, is {value}, and was locked all the time'
            time.sleep(self.random.choice((0, 0, 0.001, 0.01, 0.05)))
            if exclusive:
                doubt = 1
                with self.board.slot(cell) as slot:
                    slot[1] = 1
                os.pwrite(fd, struct.pack('<Q', value + 1), index * WIDTH)
                if self.random.random() < 0.1:
                    os.fsync(fd)
                value += 1
                doubt = 0
                with self.board.slot(cell) as slot:
                    slot[:2] = value, 0
            elif self.random.random() < 0.5:
                again = self.look(cell, fd, index)
                assert again == value, f'{CELLS[cell]} was {value}, is {again}, and was shared all the time'
            return value
        finally:
            with self.board.slot(cell) as slot:
                slot[1] = max(slot[1], doubt)
                slot[2 + (not exclusive)] = 0 if exclusive else slot[3] - 1

    def look(self, cell, fd, index):
        value = struct.unpack('<Q', os.pread(fd, 8, index * WIDTH))[0]
        with self.board.slot(cell) as slot:
            assert 0 <= value - slot[0] <= slot[1], f'{CELLS[cell]} shows {value}: {slot[0]} was written, or {slot[1]} more'
            slot[:2] = value, 0
        return value

    # ---- what must leave nothing behind

    def nameless(self):
        """A locked file that loses its name."""
        name = f'nameless {self.seed}'
        fd = self.open(name, os.O_RDWR | os.O_CREAT)
        try:
            self.ask(fd, self.random.choice((FLOCK, POSIX, OFD)), 0, fcntl.F_WRLCK, True)
            os.unlink(name, dir_fd=self.root)
            os.pwrite(fd, b'x', 0)
            time.sleep(self.random.choice((0, 0.01, 0.2)))
            assert os.pread(fd, 2, 0) == b'x' and os.fstat(fd).st_nlink == 0
        finally:
            os.close(fd)

    def killed(self):
        """A process that is killed while it has a lock or waits for one."""
        kind, name, index = self.random.choice(CELLS)
        child = os.fork()
        if child == 0:
            try:
                self.ask(self.open(name), kind, index, self.random.choice((fcntl.F_RDLCK, fcntl.F_WRLCK)), True)
                time.sleep(10)
            finally:
                os._exit(0)
        time.sleep(self.random.choice((0, 0.001, 0.01, 0.1)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


class Locked:
    """The processes of all sites. To be stopped before the sites are."""

    def __init__(self, first_mount, scratch):
        self.scratch = scratch
        self.path = f'{scratch}/board'
        self.board = Board(self.path)
        self.said = []
        self.running = []  # (mount, process)
        for name in FILES:
            with open(f'{first_mount}/{name}', 'wb') as f:
                f.write(bytes(4 * WIDTH))
        sandbox.to_close.append(self)

    def start(self, mount, seed):
        out = open(f'{self.scratch}/locker {seed}', 'w+')
        root = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)  # now: it may have ended before the process begins
        process = subprocess.Popen([sys.executable, '-B', __file__, str(root), self.path, seed], stdout=out, stderr=out,
                                   pass_fds=(root,))
        os.close(root)
        self.running.append((mount, process, out))

    def running_well(self, mount):
        """Fails as soon as one of the mount's processes has found something wrong."""
        for one in list(self.running):
            if one[0] == mount and one[1].poll():
                self._wait_for(one, 0)

    def ended(self, mount=None, timeout=60):
        """Waits for the processes of a mount that has ended, or of all: none of them was told an error, or waits for ever."""
        deadline = time.monotonic() + timeout * sandbox.PATIENCE
        for one in [one for one in self.running if mount in (None, one[0])]:
            self._wait_for(one, max(0.1, deadline - time.monotonic()))

    def _wait_for(self, one, seconds):
        mount, process, out = one
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f'a process with locks on {mount} hangs: {out.name}') from None
        out.seek(0)
        text = out.read()
        assert process.returncode == 0, f'{out.name} on {mount}:\n{text}'
        out.close()
        self.running.remove(one)
        self.said.append(text.strip())

    def stop(self):
        self.board.memory[STOP] = 1
        self.ended()

    def check(self, mounts):
        """With all processes gone: nothing is locked, and every mount shows what was counted."""
        for mount in mounts:
            for cell, (kind, name, index) in enumerate(CELLS):
                fd = os.open(f'{mount}/{name}', os.O_RDWR)
                sandbox.eventually(lambda: self.is_free(fd, kind, index), f'{mount}: {CELLS[cell]} is free')
                value = struct.unpack('<Q', os.pread(fd, 8, index * WIDTH))[0]
                with self.board.slot(cell) as slot:
                    assert 0 <= value - slot[0] <= slot[1], f'{mount}: {CELLS[cell]} shows {value}, {slot} was counted'
                    slot[:2] = value, 0
                os.close(fd)

    @staticmethod
    def is_free(fd, kind, index):
        """close(2) does not wait for the RELEASE that gives up locks other than POSIX ones."""
        try:
            Locker.ask(fd, kind, index, fcntl.F_WRLCK, False)
        except BlockingIOError:
            return False
        return True

    def describe(self):
        for mount, process, out in self.running:
            if process.poll() is None:
                with open(f'/proc/{process.pid}/stack', errors='replace') as f:
                    print(f'{out.name} on {mount} is at\n{f.read()}')

    def close(self):
        self.board.memory[STOP] = 1
        for _, process, _ in self.running:
            process.kill()
        for _, process, _ in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)


if __name__ == '__main__':
    locker = Locker(*sys.argv[1:])
    with contextlib.suppress(Gone):
        locker.run()
    print(f'{locker.granted} granted, {locker.alarms} not waited for, {locker.deadlocks} deadlocks')
