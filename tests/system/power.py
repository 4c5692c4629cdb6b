"""Sites whose machines can lose their power: each has a disk of its own, for its state and its store."""

import fcntl
import os
import random
import struct

import sandbox
from cluster import Cluster
from sandbox import WORK, run

BOOT_ID = '/proc/sys/kernel/random/boot_id'
BLOCK = 4096
FIBMAP = 1


class Disk:
    """An ext4 file system that writes to its device only what it is made to."""

    def __init__(self, name):
        self._name = name
        self._cuts = 0
        self.where = f'{WORK}/{name}'
        with open(self._image(), 'wb') as f:
            f.truncate(512 << 20)
        run('mkfs.ext4', '-q', '-F', '-b', BLOCK, '-E', 'lazy_itable_init=1,lazy_journal_init=1', self._image())
        os.mkdir(self.where)
        self._mount()
        sandbox.to_close.append(self)

    def _image(self):
        return f'{WORK}/power-{self._name}-{self._cuts}'

    def _mount(self):
        run('mount', '-o', 'loop,noatime,commit=600', self._image(), self.where)
        os.chmod(self.where, 0o755)

    def cut(self, lost=None):
        """What has not reached the device is gone. Nobody uses it any more. `lost`: files, each with the bytes that it has
        on the device still, though its times and all else are there: where they lie is written again only when some
        thread of the kernel, or anybody's sync(2), comes to it."""
        places = {path: self._places(path) for path in lost or {}}
        before = self._image()
        self._cuts += 1
        run('cp', '--sparse=always', before, self._image())
        run('umount', '-l', self.where)
        os.unlink(before)
        with open(self._image(), 'r+b') as device:
            for path, blocks in places.items():
                for number, block in enumerate(blocks):
                    device.seek(block * BLOCK)
                    device.write(lost[path][number * BLOCK:(number + 1) * BLOCK].ljust(BLOCK, b'\0'))
        self._mount()
        for path in places:
            with open(path, 'rb') as f:
                assert f.read() == lost[path], f'{path} has lost nothing'

    @staticmethod
    def _places(path):
        """Makes the file durable; the numbers of its blocks on the device."""
        with open(path, 'rb') as f:
            os.fsync(f)
            size = os.fstat(f.fileno()).st_size
            return [struct.unpack('i', fcntl.ioctl(f, FIBMAP, struct.pack('i', number)))[0]
                    for number in range(-(-size // BLOCK))]

    def describe(self):
        pass

    def close(self):
        run('umount', '-l', self.where)
        os.rmdir(self.where)
        os.unlink(self._image())


def boot():
    """From now on the machine says that it was started again: this is what daemons read when they start."""
    with open(f'{WORK}/boot_id', 'w') as f:
        f.write(f'{random.randbytes(16).hex()}\n')


def cluster(sites=3, state_apart=False, **options):
    """`state_apart`: only the stores lie on these disks; what is said of them is on one that has always written all."""
    names = Cluster.NAMES[:sites]
    disks = {name: Disk(f'{name}-store' if state_apart else name) for name in names}
    boot()
    if BOOT_ID not in sandbox.mounts():
        run('mount', '--bind', f'{WORK}/boot_id', BOOT_ID)
    made = Cluster(sites, stores=[f'{disks[name].where}/store' for name in names], **options)
    os.makedirs(f'{WORK}/logs', exist_ok=True)
    for site in made:
        site.disk = disks[site.name]
        with open(site.log) as old, open(f'{WORK}/logs/{site.name}', 'w') as new:
            new.write(old.read())
        site.log = f'{WORK}/logs/{site.name}'
    return made


def cut(site, lost=None):
    """The machine of this site, whose daemon runs or was killed just now, loses its power (`lost`: see Disk)."""
    if site.process is not None:
        site.process.kill()
        site.process.wait(30)
    site.disk.cut(lost)
    site._bury()
    boot()
