"""Sites whose machines can lose their power: each has a disk of its own, for its state and its store."""

import os
import random

import sandbox
from cluster import Cluster
from sandbox import WORK, run

BOOT_ID = '/proc/sys/kernel/random/boot_id'


class Disk:
    """An ext4 file system that writes to its device only what it is made to."""

    def __init__(self, name):
        self._name = name
        self._cuts = 0
        self.where = f'{WORK}/{name}'
        with open(self._image(), 'wb') as f:
            f.truncate(512 << 20)
        run('mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=1,lazy_journal_init=1', self._image())
        os.mkdir(self.where)
        self._mount()
        sandbox.to_close.append(self)

    def _image(self):
        return f'{WORK}/power-{self._name}-{self._cuts}'

    def _mount(self):
        run('mount', '-o', 'loop,noatime,commit=600', self._image(), self.where)
        os.chmod(self.where, 0o755)

    def cut(self):
        """What has not reached the device is gone. Nobody uses it any more."""
        before = self._image()
        self._cuts += 1
        run('cp', '--sparse=always', before, self._image())
        run('umount', '-l', self.where)
        os.unlink(before)
        self._mount()


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


def cluster(sites=3, **options):
    names = Cluster.NAMES[:sites]
    disks = {name: Disk(name) for name in names}
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


def cut(site):
    """The machine of this site, whose daemon runs or was killed just now, loses its power."""
    if site.process is not None:
        site.process.kill()
        site.process.wait(30)
    site.disk.cut()
    site._bury()
    boot()
