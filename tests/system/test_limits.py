#!/usr/bin/env python3
"""Limits: full disks, many files under `ulimit -n 1024`, memory."""

import errno
import functools
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time

import content
import sandbox
from actor import ZERO_RANGE, Actor
from cluster import Cluster, DATA_SET, SHAREFS, Site
from loads import Load, once
from tree import SAME_CONTENT, assert_same, digest

FILES = int(os.environ.get('SHAREFS_TEST_FILES', '100000'))
MEGABYTES = int(os.environ.get('SHAREFS_TEST_MEGABYTES', '512'))
MEMORY_MIB = 256


def a_target_without_space_is_refused():
    stores = [sandbox.ext4() + '/alpha', sandbox.tmpfs('size=16m') + '/beta']
    os.mkdir(stores[0])
    content.bulk(stores[0], 40)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    summary = alpha.migrate(beta, check=False)
    assert summary['result'] == 'failed' and summary['exit'] != 0, summary
    assert 'space' in summary['error'] and '\n' not in summary['error'], summary
    assert summary['image_bytes_sent'] == 0, summary
    asked = alpha.cli('migrate', 'd', '--to', 'beta', '--dry-run', check=False)
    assert asked.returncode != 0 and asked.stderr.strip() == f'sharefs: {summary["error"]}', asked
    assert cluster.owner() is alpha


def a_target_that_cannot_be_written_is_refused():
    disk = sandbox.ext4('64M')
    cluster = Cluster(2, stores=[sandbox.ext4() + '/alpha', f'{disk}/beta'], content=content.small)
    alpha, beta = cluster
    sandbox.run('mount', '-o', 'remount,ro', disk)
    for options in ((), ('--dry-run',)):
        asked = alpha.cli('migrate', 'd', '--to', 'beta', *options, check=False)
        assert asked.returncode != 0 and f'beta cannot write to {beta.store}' in asked.stderr, (options, asked)
    assert cluster.owner() is alpha
    sandbox.run('mount', '-o', 'remount,rw', disk)
    alpha.migrate(beta, '--max-pause', '2s')


def an_old_image_needs_no_room_again():
    """A disk that holds an old image, and has not room for another one, takes the data set back."""
    stores = [sandbox.tmpfs('size=64m') + '/alpha', sandbox.ext4() + '/beta']
    os.mkdir(stores[0])
    content.bulk(stores[0], 40)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    alpha.migrate(beta, '--max-pause', '1s')
    plan = json.loads(beta.cli('migrate', 'd', '--to', 'alpha', '--dry-run', '--json').stdout)
    assert plan.get('holds_image') is True and plan['space'] < plan['bytes'], plan
    summary = beta.migrate(alpha, '--max-pause', '1s')
    assert summary['image_bytes_sent'] < 1 << 20, summary
    cluster.verify(alpha, beta)


def a_disk_takes_back_what_was_replaced():
    """Every file was saved anew: what the old image has under other inodes makes room."""
    stores = [sandbox.tmpfs('size=64m') + '/alpha', sandbox.ext4() + '/beta']
    os.makedirs(stores[0] + '/deep/er')
    content.bulk(stores[0] + '/deep/er', 40)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    alpha.migrate(beta, '--max-pause', '2s')
    folder = f'{beta.mountpoint}/deep/er'
    kept = sorted(os.listdir(folder))[0]
    for name in sorted(os.listdir(folder))[1:]:
        with open(f'{folder}/{name}', 'rb') as old, open(f'{folder}/new', 'wb') as new:
            new.write(old.read()[::-1])
        os.rename(f'{folder}/new', f'{folder}/{name}')
    os.rename(f'{beta.mountpoint}/deep', f'{beta.mountpoint}/moved')
    os.rename(f'{beta.mountpoint}/moved/er/{kept}', f'{beta.mountpoint}/kept')
    beta.migrate(alpha, '--max-pause', '2s')
    cluster.verify(alpha, beta)


def _refuses(what, coarse=False):
    """The target's file system cannot keep it: that is said in one line, and no full disk."""
    stores = [sandbox.tmpfs('size=100m') + '/alpha', sandbox.ext4('300M', coarse=coarse) + '/beta']
    os.mkdir(stores[0])
    content.write(f'{stores[0]}/f', b'x')
    os.utime(f'{stores[0]}/f', ns=(1, 1_000_000_123_456_789))
    if not coarse:
        try:
            os.setxattr(f'{stores[0]}/f', 'user.big', bytes(20000))
        except OSError as error:
            raise sandbox.Skip(f'tmpfs has no extended attributes: {error}') from None
    cluster = Cluster(2, stores=stores)
    summary = cluster[0].migrate(cluster[1], '--max-pause', '2s', check=False)
    assert summary['result'] == 'failed' and what in summary['error'], summary
    assert '\n' not in summary['error'] and 'full' not in summary['error'], summary
    assert cluster.owner() is cluster[0]


def a_takeover_needs_no_inode():
    """The data set takes the last one: its root stays in the private area until there is room, whoever owns."""
    stores = [sandbox.ext4('300M') + '/alpha', sandbox.tmpfs('size=64m,nr_inodes=300') + '/beta']
    os.mkdir(stores[0])
    os.chmod(stores[0], 0o751)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    os.mkdir(f'{alpha.mountpoint}/d')
    for i in range(os.statvfs(beta.store).f_favail - 1):
        content.write(f'{alpha.mountpoint}/d/f{i}', b'x')
    alpha.migrate(beta, '--max-pause', '2s')
    beta.restart()
    cluster.wait_connected()
    tree = f'{beta.store}/.sharefs/tree'
    for site in cluster:
        actor = Actor(site.mountpoint)
        assert os.listdir(tree) == ['d']
        assert actor.do('content', 'd/f0', timeout=10) == ('ok', b'x')
        assert actor.do('put', 'd/f0', b'y', timeout=10) == ('ok', 1)
        assert actor.do('lstat', '')[1]['mode'] == '0o751'
        assert actor.do('put', 'd/one more', b'y', timeout=10) == ('errno', 'ENOSPC')
        content.write(f'{site.mountpoint}/d/f0', b'x')
    for source, target in ((beta, alpha), (alpha, beta)):
        source.migrate(target, '--max-pause', '2s')
        cluster.wait_agreed(target)
        cluster.verify(target, source)
        assert os.listdir(tree) == ['d'] and os.listdir(beta.store) == ['.sharefs']
    for i in range(1, 100):  # they are deleted in batches
        os.unlink(f'{alpha.mountpoint}/d/f{i}')
    sandbox.eventually(lambda: os.listdir(tree) == [] and 'd' in os.listdir(beta.store), 'it is in place')
    for site in cluster:
        assert Actor(site.mountpoint).do('content', 'd/f0', timeout=10) == ('ok', b'x')
    cluster.hand_over_and_compare(alpha, '--max-pause', '2s')


def a_disk_that_takes_two_names_for_one_is_refused():
    """A and a, which another site has both, would be one file in it."""
    disk = sandbox.ntfs_without_case()
    cluster = Cluster(2, stores=[sandbox.ext4() + '/alpha', f'{disk}/beta'], mount=False)
    alpha, beta = cluster
    alpha.start()
    joined = cluster.join(beta, check=False)
    adopted = beta.cli('init', 'other', '--store', f'{disk}/beta', check=False)
    for refused in (joined, adopted):
        assert refused.returncode == 1 and 'names that differ in case' in refused.stderr, refused
        assert refused.stderr.count('\n') == 1, refused
    assert os.listdir(f'{disk}/beta') == [], os.listdir(f'{disk}/beta')


def a_failed_init_leaves_nothing():
    """It can be repeated at once, here or for another directory."""
    for disk, size in ('size=64m,nr_inodes=20', '64m'), ('size=64m', '64k'):
        store, home = sandbox.tmpfs(disk), sandbox.tmpfs(f'size={size}')
        content.write(f'{store}/f', b'x')
        if 'nr_inodes' in disk:
            for i in range(os.statvfs(store).f_favail - 3):
                content.write(f'{store}/f{i}', b'x')
        before = os.listdir(store)
        command = [SHAREFS, '--home', f'{home}/deep/home', 'init', 'd', '--store', store, '--site', 'alpha']
        failed = subprocess.run(command, capture_output=True, text=True)
        assert failed.returncode == 1 and failed.stderr.startswith('sharefs: ') and failed.stderr.count('\n') == 1, failed
        assert os.listdir(store) == before and os.listdir(home) == [], (os.listdir(store), os.listdir(home))
        sandbox.run('mount', '-o', 'remount,size=64m,nr_inodes=1000', store)
        sandbox.run('mount', '-o', 'remount,size=64m', home)
        sandbox.run(*command)


def a_removal_needs_no_inode():
    """On a disk without inodes everything can be removed. Who has no place for what is removed is told why."""
    disk = sandbox.ext4('64M', inodes=200)
    cluster = Cluster(1, stores=[f'{disk}/alpha'])
    alpha, = cluster
    actor = Actor(alpha.mountpoint)
    assert actor.do('mkdir', 'empty', 0o755)[0] == 'ok'
    made = 0
    while actor.do('put', f'f{made}', b'x') == ('ok', 1):
        made += 1
    assert os.statvfs(disk).f_ffree == 0
    alpha.stop()
    actor.close()
    area = f'{alpha.store}/.sharefs'
    for folder in (f'{area}/orphans', f'{area}/parked', f'{area}/tree'):
        os.rmdir(folder)  # by somebody who tidied up
    for i in range(3):
        content.write(f'{disk}/other{i}', b'')
    refused = alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False)
    assert refused.returncode == 1 and refused.stderr.startswith('sharefs: ') and refused.stderr.count('\n') == 1, refused
    assert f'{area}/tree' in refused.stderr and 'No space left' in refused.stderr, refused
    for i in range(3):
        os.unlink(f'{disk}/other{i}')
    alpha.start()
    actor = Actor(alpha.mountpoint)
    assert os.statvfs(disk).f_ffree == 0
    assert actor.do('rmdir', 'empty') == ('ok', None)
    assert actor.do('rename', 'f0', 'f1') == ('ok', None)
    for i in range(1, made):
        assert actor.do('unlink', f'f{i}') == ('ok', None)
    assert actor.do('put', 'new', b'x') == ('ok', 1)


def an_ordinary_user_moves_what_may_not_be_written():
    """Directories, and the root itself, of mode 0555: changed, moved, handed over and back."""
    def fill(store):
        for path in ('p', 'q', 'p/moves', 'ro', 'ro/deep', 'gone', 'gone/sub'):
            os.mkdir(f'{store}/{path}')
        for path in ('p/moves/a', 'ro/a', 'ro/old', 'gone/a', 'gone/sub/b', 'file'):
            content.write(f'{store}/{path}', b'a')
            os.setxattr(f'{store}/{path}', 'user.x', b'1')
        for path in ('p/moves', 'ro/deep', 'ro', 'gone/sub', 'gone'):
            os.chmod(f'{store}/{path}', 0o555)
        os.chmod(f'{store}/file', 0o444)
        sandbox.run('chown', '-R', f'{sandbox.TESTER}:{sandbox.TESTER}', store)

    cluster = Cluster(2, user=sandbox.TESTER, content=fill)
    alpha, beta = cluster
    actor = Actor(alpha.mountpoint, sandbox.TESTER)

    def tree(store):
        fields = [field for field in SAME_CONTENT if field != 'nlink']
        return {path: entry for path, entry in digest(store, fields).items() if not path.startswith(b'.sharefs')}

    def hand_over(source, target):
        before = tree(source.store)
        source.migrate(target, '--max-pause', '2s')
        assert_same(before, tree(target.store), f'the store of {target.name}')
        assert actor.do('lstat', '')[1]['mode'] == '0o555'
        cluster.verify(target, source)

    assert actor.do('lstat', '')[1]['mode'] == '0o755'
    assert actor.do('chmod', '', 0o555) == ('ok', None)
    hand_over(alpha, beta)
    steps = [('chmod', '', 0o755), ('chmod', 'ro', 0o755), ('put', 'ro/new', b'new'), ('unlink', 'ro/old'),
             ('chmod', 'ro', 0o555), ('chmod', 'p/moves', 0o755), ('rename', 'p/moves', 'q/moves'),
             ('chmod', 'q/moves', 0o555), ('chmod', 'gone', 0o755), ('chmod', 'gone/sub', 0o755),
             ('unlink', 'gone/sub/b'), ('unlink', 'gone/a'), ('rmdir', 'gone/sub'), ('rmdir', 'gone'),
             ('chmod', 'file', 0o644), ('setxattr', 'file', 'user.x', b'2'), ('chmod', 'file', 0o444),
             ('chmod', '', 0o555)]
    for step in steps:
        result = actor.do(*step)
        assert result[0] == 'ok', (step, result)
    hand_over(beta, alpha)
    hand_over(alpha, beta)
    beta.restart()
    cluster.wait_connected()
    assert actor.do('content', 'ro/new', timeout=10) == ('ok', b'new')


def a_target_without_privileges_is_refused():
    """An ordinary user's site takes the files of that user only."""
    disk = sandbox.ext4()
    cluster = Cluster(1, disk=disk)
    alpha = cluster[0]
    store = f'{disk}/beta'
    os.mkdir(store)
    os.chown(store, sandbox.TESTER, sandbox.TESTER)
    beta = Site(cluster.network, 'beta', store, sandbox.TESTER)
    cluster.sites.append(beta)
    cluster.join(beta)
    beta.start()
    with open(f'{alpha.mountpoint}/of-root', 'w') as f:
        f.write('x')
    for options in ((), ('--dry-run',)):
        refused = alpha.cli('migrate', 'd', '--to', 'beta', *options, check=False)
        assert refused.returncode != 0 and 'does not run as root' in refused.stderr and 'find -uid 0' in refused.stderr, refused
        assert sum(line.startswith('sharefs:') for line in refused.stderr.splitlines()) == 1, refused
    assert cluster.owner() is alpha
    for path in (alpha.mountpoint, f'{alpha.mountpoint}/of-root'):
        os.chown(path, sandbox.TESTER, sandbox.TESTER)
    os.chown(f'{alpha.mountpoint}/of-root', sandbox.TESTER, 0)
    assert 'find -gid 0' in alpha.cli('migrate', 'd', '--to', 'beta', check=False).stderr
    os.chown(f'{alpha.mountpoint}/of-root', sandbox.TESTER, sandbox.TESTER)
    alpha.migrate(beta, '--max-pause', '1000h')
    cluster.verify(beta, alpha)


def what_cannot_be_noted_is_only_told():
    """Questions before a handoff, and comparisons, are answered by an owner whose state folder is full."""
    state = SmallState('alpha')
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    alpha.migrate(beta, '--max-pause', '2s')
    beta.migrate(alpha, '--max-pause', '2s')
    state.fill()
    for i in range(400):  # whatever room its database has in itself
        asked = alpha.cli('migrate', 'd', '--to', 'beta', '--dry-run', check=False)
        assert alpha.running(), 'the daemon has ended'
        if asked.returncode != 0:
            break
    assert asked.stderr.startswith('sharefs: alpha: ') and asked.stderr.count('\n') == 1, asked
    for i in range(20):
        assert Actor(alpha.mountpoint).do('put', f'new{i}', b'')[0] == 'ok'
    for site in (beta, alpha):
        site.cli('verify', 'd', check=False, timeout=30)
        assert alpha.running(), 'the daemon has ended'
    state.make_room()
    cluster.hand_over_and_compare(beta, '--max-pause', '2s')


class ThinDisk:
    """A file system that promises more than it has: what is written where nothing was before fails."""

    BLOCK = 4096
    MEGABYTES = 192

    def __init__(self):
        self._pool = sandbox.tmpfs('size=96m')
        image = f'{self._pool}/image'
        self.where = sandbox.ext4(f'{self.MEGABYTES}M', block=self.BLOCK, image=image)
        # Not what it keeps of itself.
        told = sandbox.run('dumpe2fs', image).stdout
        free = [[int(n) for n in found.split('-')] for line in re.findall(r'^  Free blocks: (.*)$', told, re.MULTILINE)
                for found in line.split(', ') if found]
        with open(image, 'r+b') as f:
            after = 0
            for first, *last in [*free, [(self.MEGABYTES << 20) // self.BLOCK]]:
                if first > after:
                    os.posix_fallocate(f.fileno(), after * self.BLOCK, (first - after) * self.BLOCK)
                after = (last or [first])[0] + 1

    def has_nothing_left(self):
        """What was written before may still be on its way there, so nobody knows how much is left."""
        size, step = 0, 1 << 24
        with open(f'{self._pool}/ballast', 'wb') as f:
            while step >= self.BLOCK:
                try:
                    os.posix_fallocate(f.fileno(), size, step)
                    size += step
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error
                    step //= 2

    def has_more(self):
        os.remove(f'{self._pool}/ballast')


def what_a_disk_failed_to_write_is_not_believed():
    """The next attempt finds the file with all its attributes, and for a while its bytes, but those are not on the disk."""
    disk = ThinDisk()
    cluster = Cluster(2, stores=[sandbox.ext4() + '/alpha', disk.where + '/beta'], content=content.small)
    alpha, beta = cluster
    alpha.migrate(beta, '--max-pause', '2s')
    beta.migrate(alpha, '--max-pause', '2s')
    disk.has_nothing_left()
    written = os.urandom(4 << 20)
    with open(f'{alpha.mountpoint}/new', 'wb') as f:
        f.write(written)
    failed = alpha.migrate(beta, '--max-pause', '2s', check=False)
    assert failed['result'] == 'failed' and failed['error'].startswith('beta: cannot sync the store'), failed
    disk.has_more()
    alpha.migrate(beta, '--max-pause', '2s')
    sandbox.drop_caches()
    with open(f'{beta.store}/new', 'rb') as f:
        assert f.read() == written
    cluster.verify(beta, alpha)


def a_daemon_that_ends_with_what_its_disk_does_not_take_is_told_of():
    disk = ThinDisk()
    alpha, = Cluster(1, stores=[disk.where + '/alpha'])
    disk.has_nothing_left()
    content.write(f'{alpha.mountpoint}/new', os.urandom(4 << 20))
    ended = alpha.cli('umount', DATA_SET, check=False)
    assert ended.returncode == 1 and f'not noted that all of {alpha.store} is on the disk' in ended.stderr, ended
    assert ended.stderr.count('\n') == 1 and alpha.process.wait(30 * sandbox.PATIENCE) == 0, ended
    alpha.process = None


def a_target_that_fills_up_ends_the_attempt():
    disk = sandbox.tmpfs('size=24m')
    stores = [sandbox.ext4() + '/alpha', disk + '/beta']
    os.mkdir(stores[0])
    content.bulk(stores[0], 14)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    load = Load('writer', dir=beta.mountpoint, id='w', expect=f'{sandbox.WORK}/w', rate=200, files=2)
    migration = alpha.migrate_in_background(beta, '--rate', '5MiB/s')
    time.sleep(0.8)
    with open(f'{disk}/ballast', 'wb') as f:  # somebody else uses the disk too
        f.write(bytes(17 << 20))
    summary = migration.finish(check=False)
    assert summary['result'] == 'failed' and summary['error'] and '\n' not in summary['error'], summary
    assert cluster.owner() is alpha
    os.remove(f'{disk}/ballast')
    alpha.migrate(beta, '--max-pause', '2s')
    load.stop()
    once('verify-writer', dir=alpha.mountpoint, id='w', expect=f'{sandbox.WORK}/w')
    cluster.verify(beta, alpha)


def a_store_that_cannot_be_put_away_keeps_nobody_waiting():
    """After the commit point the old owner's disk lets it change nothing: its applications go on at the new one."""
    disk = sandbox.ext4()
    stores = [f'{disk}/alpha', f'{disk}/beta']
    os.mkdir(stores[0])
    content.small(stores[0], files=40)
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    fixed, area = f'{alpha.store}/fixed', f'{alpha.store}/.sharefs'
    assert Actor(alpha.mountpoint).do('put', 'fixed', b'x')[0] == 'ok'
    sandbox.run('chattr', '+i', fixed)
    refused = alpha.migrate(beta, check=False)
    sandbox.run('chattr', '-i', fixed)
    assert refused['result'] == 'failed' and "'fixed'" in refused['error'] and 'chattr' in refused['error'], refused
    # Nor could the copy here be written over when the data set comes back.
    below = f'{alpha.store}/special/sparse'
    sandbox.run('chattr', '+a', below)
    refused = alpha.migrate(beta, check=False)
    sandbox.run('chattr', '-a', below)
    assert refused['result'] == 'failed' and os.path.relpath(below, alpha.store) in refused['error'], refused
    sandbox.run('chattr', '+i', area)
    try:
        alpha.migrate(beta, '--max-pause', '2s')
        actor = Actor(alpha.mountpoint)
        assert actor.do('put', 'new', b'x', timeout=10)[0] == 'ok' and actor.do('content', 'new') == ('ok', b'x')
        refused = beta.migrate(alpha, check=False)
        assert refused['result'] == 'failed' and 'relocation' in refused['error'], refused
        alpha.restart()
        assert Actor(alpha.mountpoint).do('content', 'new') == ('ok', b'x')
    finally:
        sandbox.run('chattr', '-i', area)
    sandbox.eventually(lambda: os.listdir(alpha.store) == ['.sharefs'], 'it is put away')
    beta.migrate(alpha, '--max-pause', '2s')
    cluster.verify(alpha, beta)


def fill_disk(path, block):
    """With a file, until not a block of that size is left."""
    with open(path, 'wb', buffering=0) as f:
        try:
            while True:
                f.write(bytes(block))
        except OSError as error:
            assert error.errno == errno.ENOSPC, error


class SmallState:
    """The state folder of a site that is not there yet lies on a disk of its own, which can be filled."""

    def __init__(self, name):
        self._path = f'{sandbox.WORK}/{name}/home'
        os.makedirs(self._path)
        sandbox.run('mount', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs', self._path)
        sandbox.to_close.insert(0, self)

    def fill(self):
        fill_disk(f'{self._path}/ballast', 4096)

    def make_room(self):
        os.unlink(f'{self._path}/ballast')

    def database(self, **options):
        folder, = (entry for entry in os.listdir(self._path) if entry != 'ballast')
        return sqlite3.connect(f'file:{self._path}/{folder}/state.db', uri=True, isolation_level=None, **options)

    def value(self, query):
        database = self.database()
        try:
            return database.execute(query).fetchone()[0]
        finally:
            database.close()

    def describe(self):
        pass

    def close(self):
        sandbox.run('umount', '-l', self._path)


def a_full_state_folder_of_the_target_ends_the_handoff():
    state = SmallState('beta')
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/f{i}', b'old') for i in range(1000)])
    alpha, beta = cluster
    beta.restart(faults='image.target.end=sleep:2000')
    cluster.wait_connected()
    migration = alpha.migrate_in_background(beta, '--max-pause', '5s')
    sandbox.eventually(lambda: alpha.phase() == 'image', 'the image', every=0.02)
    state.fill()
    assert migration.finish(check=False)['result'] == 'failed'
    assert beta.running()
    assert Actor(beta.mountpoint).do('put', 'new', b'x')[0] == 'ok'
    state.make_room()
    cluster.hand_over_and_compare(beta, '--max-pause', '5s')


def a_full_state_folder_of_the_source_ends_the_handoff():
    """Nor does it keep a request waiting that was noted as a record before."""
    state = SmallState('alpha')
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/f{i}', b'old') for i in range(20)])
    alpha, beta = cluster
    alpha.restart(faults='gate.records-durable=sleep:1500@1')
    beta.restart(faults='target.before_prepared=sleep:1000')
    cluster.wait_connected()
    app = Actor(alpha.mountpoint)
    assert app.do('open', 1, 'f0', os.O_RDWR)[0] == 'ok'
    migration = alpha.migrate_in_background(beta, '--max-pause', '4s')
    sandbox.eventually(lambda: alpha.phase() == 'finishing', 'the gate is closed', every=0.02)
    app.send('pwrite', 1, b'x' * 4096, 0)
    sandbox.eventually(lambda: state.value('SELECT count(*) FROM record') > 0, 'the record is durable', every=0.01)
    state.fill()
    assert app.receive(timeout=20) == ('ok', 4096)
    assert migration.finish(check=False)['result'] == 'failed'
    assert alpha.running()
    state.make_room()
    cluster.hand_over_and_compare(beta, '--max-pause', '4s')


def a_full_state_folder_keeps_no_site_from_a_new_owner():
    """The site hears of it from nobody else, and cannot note it."""
    state = SmallState('gamma')
    cluster = Cluster(3)
    alpha, beta, gamma = cluster
    app = Actor(gamma.mountpoint)
    assert app.do('put', 'a', b'x')[0] == 'ok'
    state.fill()
    cluster.network.cut('gamma')
    alpha.migrate(beta, '--max-pause', '5s')
    alpha.kill()
    cluster.network.heal('gamma')
    assert app.do('put', 'b', b'x', timeout=30)[0] == 'ok'
    gamma.kill()
    state.make_room()
    gamma.start()
    assert Actor(gamma.mountpoint).do('put', 'c', b'x')[0] == 'ok'


def a_full_state_folder_is_no_hindrance_to_an_end():
    """What could not be noted is in the journal. That the store was synced is not: umount tells."""
    state = SmallState('alpha')
    cluster = Cluster(1)
    alpha, = cluster
    state.fill()
    for number in range(200):
        content.write(f'{alpha.mountpoint}/f{number}', b'x')
    ids = [os.stat(f'{alpha.mountpoint}/f{number}').st_ino for number in range(200)]
    ended = alpha.cli('umount', DATA_SET, check=False)
    assert ended.returncode == 1 and 'has ended, but it has not noted' in ended.stderr, ended
    assert alpha.process.wait(30 * sandbox.PATIENCE) == 0
    alpha.process = None
    state.fill()
    shown = alpha.cli('status', DATA_SET, check=False)
    assert shown.returncode == 1 and 'No space left on device' in shown.stderr, shown
    state.make_room()
    alpha.start()
    assert ids == [os.stat(f'{alpha.mountpoint}/f{number}').st_ino for number in range(200)]


def what_a_full_state_folder_cannot_take_is_not_done():
    """The journal is full in the end. What is known is seen all the same."""
    state = SmallState('alpha')
    cluster = Cluster(1)
    alpha, = cluster
    app = Actor(alpha.mountpoint)
    for name in ('a', 'b', 'c'):
        assert app.do('put', name, b'x')[0] == 'ok'
    os.mkdir(f'{alpha.mountpoint}/empty')
    state.fill()
    made = 0
    try:
        while True:
            os.mknod(f'{alpha.mountpoint}/f{made}')
            made += 1
    except OSError as error:
        assert error.errno == errno.EIO, error
    there = sorted(os.listdir(alpha.store))
    assert f'f{made}' not in there, 'it failed and was made'
    for change in (lambda m: os.mkdir(f'{m}/new'), lambda m: os.symlink('to', f'{m}/new'),
                   lambda m: os.link(f'{m}/a', f'{m}/new'), lambda m: os.unlink(f'{m}/a'),
                   lambda m: os.rmdir(f'{m}/empty'), lambda m: os.rename(f'{m}/a', f'{m}/b')):
        try:
            change(alpha.mountpoint)
        except OSError as error:
            assert error.errno == errno.EIO, error
        else:
            raise AssertionError('it is not refused')
        assert sorted(os.listdir(alpha.store)) == there
    assert os.path.getsize(f'{alpha.mountpoint}/c') == 1
    state.make_room()
    sandbox.eventually(lambda: app.do('put', 'more', b'x')[0] == 'ok', 'room is noticed')


def a_full_disk_of_small_blocks_is_no_bus_error():
    """Whatever is left free: SQLite shares memory between processes in a file that it maps."""
    disk = sandbox.ext4('40M', block=1024)
    cluster = Cluster(1, stores=[sandbox.ext4() + '/alpha'], mount=False)
    alpha = cluster[0]
    shutil.move(alpha.home, f'{disk}/home')
    alpha.home = f'{disk}/home'
    fill_disk(f'{disk}/ballast', 1024)
    codes = []
    while 0 not in codes:
        os.truncate(f'{disk}/ballast', os.path.getsize(f'{disk}/ballast') - 1024)
        shown = alpha.cli('status', DATA_SET, check=False)
        assert shown.returncode in (0, 1), f'{len(codes) + 1} KiB free: {shown}'
        codes.append(shown.returncode)
    assert 1 in codes, 'there was room from the start'


def a_takeover_goes_on_when_its_end_can_be_noted():
    """The state of the new owner is locked for longer than it waits, between its becoming that and its serving."""
    state = SmallState('beta')
    cluster = Cluster(2)
    alpha, beta = cluster
    beta.restart(faults='target.performed=sleep:1000@1')
    cluster.wait_connected()
    migration = alpha.migrate_in_background(beta, '--max-pause', '20s')
    sandbox.eventually(lambda: state.value('SELECT owner FROM ownership') in ('beta', b'beta'), 'beta owns', every=0.005)
    database = state.database()
    database.execute('BEGIN IMMEDIATE')
    time.sleep(13)
    database.execute('ROLLBACK')
    database.close()
    assert Actor(beta.mountpoint).do('put', 'new', b'x', timeout=20)[0] == 'ok'
    migration.finish()
    cluster.hand_over_and_compare(alpha, '--max-pause', '5s')


def a_stray_file_in_a_targets_store_is_refused():
    """As when the daemon starts: before anything is sent."""
    cluster = Cluster(2)
    alpha, beta = cluster
    assert os.stat(beta.store).st_mode & 0o777 == 0o700
    content.write(f'{alpha.mountpoint}/f', b'x')
    content.write(f'{beta.store}/f', b'stray')
    for options in (('--max-pause', '2s'), ('--dry-run',)):
        refused = alpha.cli('migrate', 'd', '--to', 'beta', *options, check=False)
        assert refused.returncode != 0 and f'{beta.store}/f is not part of the data set' in refused.stderr, refused
    assert beta.running() and cluster.owner() is alpha
    os.unlink(f'{beta.store}/f')
    cluster.hand_over_and_compare(beta, '--max-pause', '2s')


def a_stray_file_in_a_new_owners_store_concerns_its_name_only(user=None):
    """It was put there while the image was received."""
    def fill(store):
        for i in range(3):
            content.write(f'{store}/f{i}', b'old')
            os.chown(f'{store}/f{i}', user or 0, user or 0)

    cluster = Cluster(2, content=fill, user=user)
    alpha, beta = cluster
    beta.restart(faults='image.target.end=sleep:1500')
    cluster.wait_connected()
    migration = alpha.migrate_in_background(beta, '--max-pause', '3s')
    sandbox.eventually(lambda: alpha.phase() == 'image', 'the image', every=0.02)
    content.write(f'{beta.store}/f1', b'stray')
    migration.finish()
    for site in cluster:
        actor = Actor(site.mountpoint, user or 0)
        assert actor.do('content', 'f0', timeout=10) == ('ok', b'old')
        assert actor.do('content', 'f1', timeout=10) == ('errno', 'EIO')
    os.unlink(f'{beta.store}/f1')
    for site in cluster:
        assert Actor(site.mountpoint, user or 0).do('content', 'f1', timeout=10) == ('ok', b'old')


def a_full_disk_of_the_owner_is_told_to_everybody():
    """Deleting makes room at once, however long the owner takes to delete."""
    stores = [sandbox.tmpfs('size=8m') + '/alpha', sandbox.ext4() + '/beta']
    cluster = Cluster(2, stores=stores)
    cluster[0].restart('store-delete-orphans=sleep:30')
    cluster.wait_connected()
    for site in cluster:
        actor = Actor(site.mountpoint)
        for turn in range(4):
            results = [actor.do('put', f'{site.name}{i}', bytes(1 << 20)) for i in range(12)]
            assert ('errno', 'ENOSPC') in results, results
            for i in range(12):
                actor.do('unlink', f'{site.name}{i}')
            actor.do('open', 1, 'again', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            pieces = [bytes([1 + i]) * (1 << 20) for i in range(6)]
            for piece in pieces:
                result = actor.do('write', 1, piece)
                assert result == ('ok', 1 << 20), (turn, piece[0], result)
            actor.do('close', 1)
            assert actor.do('content', 'again') == ('ok', b''.join(pieces))
            actor.do('unlink', 'again')
        # What somebody can still reach takes its room.
        actor.do('open', 1, 'kept', os.O_CREAT | os.O_RDWR)
        result = actor.do('pwrite', 1, bytes(6 << 20), 0)
        assert result == ('ok', 6 << 20), result
        actor.do('unlink', 'kept')
        results = [actor.do('put', f'more{i}', bytes(1 << 20)) for i in range(3)]
        assert ('errno', 'ENOSPC') in results, results
        assert actor.do('pread', 1, 3, 6 << 19) == ('ok', bytes(3))
        actor.do('close', 1)
        for i in range(3):
            actor.do('unlink', f'more{i}')


def a_data_set_leaves_a_full_disk_while_somebody_goes_on_writing():
    """Writes that wait for space do not keep the pause from being short."""
    disk = sandbox.ext4('64M')
    cluster = Cluster(2, stores=[f'{disk}/alpha', sandbox.ext4() + '/beta'])
    alpha, beta = cluster
    keeper = Actor(beta.mountpoint)  # of a file that the owner sees nobody have open: its space may come
    assert keeper.do('put', 'kept', b'k')[0] == keeper.do('open', 1, 'kept', os.O_PATH)[0] == 'ok'
    assert keeper.do('unlink', 'kept')[0] == 'ok'
    content.fill_disk(f'{disk}/filler')
    writers = [Actor(site.mountpoint) for site in cluster]
    for writer in writers:
        assert writer.do('open', 1, 'log', os.O_CREAT | os.O_WRONLY | os.O_APPEND)[0] == 'ok'
    stop = threading.Event()

    def write(writer):
        while not stop.is_set() and writer.do('write', 1, bytes(4096)) == ('errno', 'ENOSPC'):
            pass

    threads = [threading.Thread(target=write, args=(writer,)) for writer in writers]
    try:
        for thread in threads:
            thread.start()
        summary = alpha.migrate(beta, '--max-pause', '500ms')
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert summary['attempts'] == 1, summary


def only_root_gets_its_reserve():
    """As on a local disk, whichever site asks, and also for what workers do."""
    disk = sandbox.ext4('96M', reserved=25)
    cluster = Cluster(2, stores=[f'{disk}/alpha', sandbox.ext4() + '/beta'])
    os.mkdir(f'{cluster[0].mountpoint}/theirs')
    os.chown(f'{cluster[0].mountpoint}/theirs', sandbox.TESTER, sandbox.TESTER)
    for site in cluster:
        user, root = Actor(f'{site.mountpoint}/theirs', sandbox.TESTER), Actor(f'{site.mountpoint}/theirs')
        assert user.do('put', 'first', bytes([7]) * (4 << 20)) == ('ok', 4 << 20)
        for fd, name in enumerate(('first', 'allocated', 'copied')):
            assert user.do('open', fd, name, os.O_CREAT | os.O_RDWR) == ('ok', None)
        results = [user.do('put', f'f{i}', bytes(1 << 20)) for i in range(80)]
        assert results[0] == ('ok', 1 << 20) and ('errno', 'ENOSPC') in results, (site.name, results)
        assert user.do('fallocate', 1, 0, 0, 4 << 20) == ('errno', 'ENOSPC'), site.name
        copied = user.do('copy_range', 0, 2, 4 << 20, 0, 0)
        assert copied[0] == 'errno' or copied[1] < 4 << 20, (site.name, copied)
        left = os.statvfs(disk)
        assert left.f_bavail == 0 and left.f_bfree * left.f_bsize > 20 << 20, (site.name, left)
        assert root.do('put', 'f0', bytes([1]) * (6 << 20)) == ('ok', 6 << 20), site.name
        for name in user.do('list')[1]:
            assert user.do('unlink', name) == ('ok', None), (site.name, name)


def many_files_under_a_small_ulimit():
    """`find` over the whole tree on an owner and on another site, a handoff, memory below the bound."""
    stores = [sandbox.ext4('12G', inodes=FILES * 2 + 10000) + '/alpha', sandbox.ext4('12G', inodes=FILES * 2 + 10000) + '/beta']
    os.mkdir(stores[0])
    content.many(stores[0], FILES)
    content.bulk(stores[0], MEGABYTES)
    cluster = Cluster(2, stores=stores, mount=False)
    alpha, beta = cluster
    alpha.start(limits=['--nofile=1024:1024'])
    cluster.join(beta)
    beta.start(limits=['--nofile=1024:1024'])
    wanted = FILES + -(-MEGABYTES // 8)
    for site in cluster:
        found = sandbox.run('find', site.mountpoint, '-type', 'f', '-size', '+0', '-printf', 'x', timeout=500).stdout
        assert len(found) == wanted, f'{site.name} shows {len(found)} files of {wanted}'
    holder = Actor(beta.mountpoint)
    for i in range(900):
        assert holder.do('open', i, f'm0/n{i // 200}/f{i}', os.O_RDWR)[0] == 'ok', i
    load = Load('paced', dir=alpha.mountpoint, rate=500)
    summary = alpha.migrate(beta, '--max-pause', '1s', timeout=400)
    stall = load.stop()['longest_stall_ms']
    for i in range(0, 900, 7):
        assert holder.do('pread', i, 3, 0)[1] == (b'%d ' % i * 3)[:3], i
    peaks = {site.name: site.memory_peak() for site in cluster}
    print(f'{FILES} files, {MEGABYTES} MiB: {summary["total_ms"]:.0f} ms, pause {summary["pause_ms"]:.0f} ms, '
          f'stall {stall:.0f} ms, memory {peaks}')
    assert all(peak < MEMORY_MIB for peak in peaks.values()), peaks
    cluster.verify(beta, alpha)


def a_shells_limit_does_not_end_the_mount():
    """`ulimit -f` is for the shell's own files. The daemon lifts it, if it may; if not, a longer file is refused."""
    alpha, = Cluster(1, mount=False)
    for hard in ('unlimited', 1 << 20):
        alpha.start(limits=['--fsize=%d:%s' % (1 << 20, hard)])
        path = f'{alpha.mountpoint}/{hard}'
        try:
            content.write(path, bytes(2 << 20))
        except OSError as error:
            assert error.errno == errno.EFBIG and hard != 'unlimited', error
        assert os.path.getsize(path) == 2 << 20 or hard != 'unlimited'
        alpha.stop()


def a_long_file_needs_no_memory():
    """2 GiB, mostly holes, with data all over it."""
    cluster = Cluster(2)
    alpha, beta = cluster
    path = f'{alpha.mountpoint}/long'
    with open(path, 'wb') as f:
        f.truncate(2 << 30)
        for at in range(0, 2 << 30, 8 << 20):
            f.seek(at)
            f.write(b'%d' % at * 20000)
    alpha.migrate(beta, '--max-pause', '1s')
    cluster.verify(beta, alpha)
    assert os.stat(f'{beta.mountpoint}/long').st_blocks * 512 < 200 << 20, 'the holes were filled'
    peaks = {site.name: site.memory_peak() for site in cluster}
    assert all(peak < MEMORY_MIB for peak in peaks.values()), peaks


def what_a_failed_change_has_done_is_seen():
    """ext4 zeroes in pieces: what it has zeroed when the disk is full stays zeroed."""
    stores = [sandbox.ext4('64M') + '/alpha', sandbox.ext4() + '/beta']
    cluster = Cluster(2, stores=stores)
    alpha, beta = cluster
    size = 1 << 20
    for site in cluster:
        content.write(f'{alpha.mountpoint}/f', b'x' * size)
        os.truncate(f'{alpha.mountpoint}/f', 256 << 20)
        actors = [Actor(site.mountpoint) for site in cluster]
        for actor in actors:
            assert actor.do('open', 'f', 'f', os.O_RDWR) == ('ok', None)
            assert actor.do('pread', 'f', size, 0) == ('ok', b'x' * size)
        by = actors[cluster.sites.index(site)]
        assert by.do('fallocate', 'f', ZERO_RANGE, 0, 256 << 20) == ('errno', 'ENOSPC')
        with open(f'{alpha.store}/f', 'rb') as f:
            now = f.read(size)
        if now == b'x' * size:
            raise sandbox.Skip('this file system has done nothing of it')
        for actor in actors:
            # The caller's own kernel hears of it behind the answer.
            sandbox.eventually(lambda: actor.do('pread', 'f', size, 0) == ('ok', now), 'what is there is seen', timeout=0.5 if actor is by else 0)
            actor.close()


if __name__ == '__main__':
    sys.exit(sandbox.main({
        'a_target_without_space_is_refused': (a_target_without_space_is_refused, 60),
        'a_target_that_cannot_be_written_is_refused': (a_target_that_cannot_be_written_is_refused, 60),
        'an_old_image_needs_no_room_again': (an_old_image_needs_no_room_again, 60),
        'a_disk_takes_back_what_was_replaced': (a_disk_takes_back_what_was_replaced, 60),
        'a_time_that_the_target_cannot_keep_is_refused': (functools.partial(_refuses, 'modification time', True), 60),
        'an_attribute_that_the_target_cannot_keep_is_refused': (functools.partial(_refuses, 'user.big'), 60),
        'a_takeover_needs_no_inode': (a_takeover_needs_no_inode, 90),
        'a_failed_init_leaves_nothing': (a_failed_init_leaves_nothing, 60),
        'a_removal_needs_no_inode': (a_removal_needs_no_inode, 60),
        'an_ordinary_user_moves_what_may_not_be_written': (an_ordinary_user_moves_what_may_not_be_written, 60),
        'a_target_without_privileges_is_refused': (a_target_without_privileges_is_refused, 60),
        'what_cannot_be_noted_is_only_told': (what_cannot_be_noted_is_only_told, 90),
        'what_a_disk_failed_to_write_is_not_believed': (what_a_disk_failed_to_write_is_not_believed, 60),
        'a_daemon_that_ends_with_what_its_disk_does_not_take_is_told_of':
            (a_daemon_that_ends_with_what_its_disk_does_not_take_is_told_of, 60),
        'a_target_that_fills_up_ends_the_attempt': (a_target_that_fills_up_ends_the_attempt, 60),
        'a_store_that_cannot_be_put_away_keeps_nobody_waiting': (a_store_that_cannot_be_put_away_keeps_nobody_waiting, 60),
        'a_full_state_folder_of_the_target_ends_the_handoff': (a_full_state_folder_of_the_target_ends_the_handoff, 60),
        'a_full_state_folder_of_the_source_ends_the_handoff': (a_full_state_folder_of_the_source_ends_the_handoff, 60),
        'a_full_state_folder_keeps_no_site_from_a_new_owner': (a_full_state_folder_keeps_no_site_from_a_new_owner, 60),
        'a_full_state_folder_is_no_hindrance_to_an_end': (a_full_state_folder_is_no_hindrance_to_an_end, 60),
        'what_a_full_state_folder_cannot_take_is_not_done': (what_a_full_state_folder_cannot_take_is_not_done, 120),
        'a_disk_that_takes_two_names_for_one_is_refused': (a_disk_that_takes_two_names_for_one_is_refused, 60),
        'a_full_disk_of_small_blocks_is_no_bus_error': (a_full_disk_of_small_blocks_is_no_bus_error, 60),
        'a_takeover_goes_on_when_its_end_can_be_noted': (a_takeover_goes_on_when_its_end_can_be_noted, 90),
        'a_stray_file_in_a_new_owners_store_concerns_its_name_only':
            (a_stray_file_in_a_new_owners_store_concerns_its_name_only, 60),
        'a_stray_file_in_an_ordinary_users_store_concerns_its_name_only':
            (functools.partial(a_stray_file_in_a_new_owners_store_concerns_its_name_only, sandbox.TESTER), 60),
        'a_stray_file_in_a_targets_store_is_refused': (a_stray_file_in_a_targets_store_is_refused, 60),
        'a_full_disk_of_the_owner_is_told_to_everybody': (a_full_disk_of_the_owner_is_told_to_everybody, 60),
        'a_data_set_leaves_a_full_disk_while_somebody_goes_on_writing':
            (a_data_set_leaves_a_full_disk_while_somebody_goes_on_writing, 60),
        'only_root_gets_its_reserve': (only_root_gets_its_reserve, 60),
        'what_a_failed_change_has_done_is_seen': (what_a_failed_change_has_done_is_seen, 60),
        'many_files_under_a_small_ulimit': (many_files_under_a_small_ulimit, 300 + FILES // 500),
        'a_shells_limit_does_not_end_the_mount': (a_shells_limit_does_not_end_the_mount, 60),
        'a_long_file_needs_no_memory': (a_long_file_needs_no_memory, 90),
    }))
