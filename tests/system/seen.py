"""Readers that open a file again and again, while others change it from other mounts: what was acknowledged before they
look must be seen, whatever their kernels and daemons keep."""

import mmap
import os
import random
import struct
import sys
import time
import traceback

import sandbox

FILES = 5
SIZE = 8192
AT = (0, 5000)  # in two pages
PAGES = (0, 4096)


def _number(fd, at):
    return struct.unpack('<Q', os.pread(fd, 8, at).ljust(8, b'\0'))[0]


class Seen:
    """One writer and one reader on each mount. The board, in shared memory, tells the readers which number was written to
    each file of each mount last."""

    def __init__(self, mounts):
        self.mounts = mounts
        self.board = mmap.mmap(-1, 4096)
        self.stop_at = 4095
        for i in range(len(mounts)):
            os.mkdir(f'{mounts[0]}/seen{i}')
            for k in range(FILES):
                with open(f'{mounts[0]}/seen{i}/{k}', 'wb') as f:
                    f.write(bytes(SIZE))
                os.utime(f'{mounts[0]}/seen{i}/{k}', ns=(0, 0))
        sandbox.to_close.append(self)
        self.processes = [self._fork(role, i) for i in range(len(mounts)) for role in (self._write, self._read)]

    def _fork(self, role, number):
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            role(number)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _slot(self, site, k):
        return 8 * (site * FILES + k)

    def _stopped(self):
        return self.board[self.stop_at] != 0

    def _write(self, site):
        where = f'{self.mounts[site]}/seen{site}'
        opened = os.open(f'{where}/0', os.O_RDWR)
        direct = os.open(f'{where}/4', os.O_RDWR | os.O_DIRECT)
        block = mmap.mmap(-1, 4096)  # aligned
        n = 0
        while not self._stopped():
            n += 1
            k = n % FILES
            path = f'{where}/{k}'
            data = struct.pack('<Q', n)
            if k == 0:  # through a descriptor that stays open
                for at in AT:
                    os.pwrite(opened, data, at)
            elif k == 1:  # opened for each write
                fd = os.open(path, os.O_WRONLY)
                for at in AT:
                    os.pwrite(fd, data, at)
                os.close(fd)
            elif k == 2:  # another file takes the name
                with open(path + '.new', 'wb', buffering=0) as f:
                    f.write((data + bytes(AT[1] - 8) + data).ljust(SIZE, b'\0'))
                os.rename(path + '.new', path)
            elif k == 4:  # past the pages of the kernel
                block[:8] = data
                for at in PAGES:
                    os.pwrite(direct, block, at)
            else:  # only attributes
                os.utime(path, ns=(n, n))
            self.board[self._slot(site, k):self._slot(site, k) + 8] = data
            time.sleep(0.0005 * (n % 5))

    def _read(self, site):
        looks = 0
        paths = [[f'{self.mounts[site]}/seen{other}/{k}' for k in range(FILES)] for other in range(len(self.mounts))]
        held = [os.open(of_one[3], os.O_RDONLY) for of_one in paths]
        mapped = [[self._map(of_one[k]) for k in (0, 4)] for of_one in paths]
        while not self._stopped():
            for other, of_one in enumerate(paths):
                for (k, places), memory in zip(((0, AT), (4, PAGES)), mapped[other]):
                    least = self._acknowledged(other, k)
                    self._check(of_one[k] + ' (mapped)', [struct.unpack_from('<Q', memory, at)[0] for at in places], least)
                for k in (0, 1, 2, 4):
                    for _ in range(4):  # from the second time on with the pages that were kept
                        self._open_and_read(of_one[k], other, k)
                least = self._acknowledged(other, 3)
                self._check(of_one[3], [os.fstat(held[other]).st_mtime_ns], least)
                self._check(of_one[3], [os.stat(of_one[3]).st_mtime_ns], least)
                looks += 1
        assert looks > 20, f'only {looks} looks'

    def _open_and_read(self, path, other, k):
        least = self._acknowledged(other, k)
        fd = os.open(path, os.O_RDONLY)
        # It may have changed before the owner heard that it is open. (2: the name may have another file later.)
        for again in range(random.choice((1, 1, 1, 5)) if k != 2 else 1):
            if again:
                time.sleep(0.0004)
                least = self._acknowledged(other, k)
            self._check(path, [_number(fd, at) for at in (PAGES if k == 4 else AT)], least)
        os.close(fd)

    @staticmethod
    def _map(path):
        fd = os.open(path, os.O_RDONLY)
        try:
            return mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)

    def _acknowledged(self, site, k):
        return struct.unpack('<Q', self.board[self._slot(site, k):self._slot(site, k) + 8])[0]

    @staticmethod
    def _check(path, found, least):
        assert min(found) >= least, f'{path} shows {found} after {least} was acknowledged'

    def describe(self):
        pass

    def close(self):
        self.board[self.stop_at] = 1

    def stop(self):
        self.close()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.processes]
        assert not any(codes), codes
