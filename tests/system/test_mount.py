#!/usr/bin/env python3
"""Mounts: every operation against plain ext4, random operations against the model, adopting and leaving, users."""

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

import content
import sandbox
from actor import Actor, file_handle, libc, open_by_handle
from cluster import Cluster, DATA_SET, SHAREFS
from loads import Everything, Load, once
from model import random_test
from ops_compare import compare
from seen import Seen
from tree import SAME_CONTENT, SAME_FILE_SYSTEM_SEEN, assert_equal, assert_same, digest

SYNC_FILE_RANGE_WRITE = 2


def operations_on_the_owner_compare_equal():
    disk = sandbox.ext4()
    cluster = Cluster(1, disk=disk)
    compare(cluster[0].mountpoint, f'{disk}/plain')


def operations_on_the_owner_with_a_second_site_compare_equal():
    disk = sandbox.ext4()
    cluster = Cluster(2, disk=disk)
    compare(cluster[0].mountpoint, f'{disk}/plain')


def operations_on_another_site_compare_equal():
    disk = sandbox.ext4()
    cluster = Cluster(2, disk=disk)
    compare(cluster[1].mountpoint, f'{disk}/plain')


def random_operations_on_the_owner():
    cluster = Cluster(1)
    random_test([cluster[0].mountpoint], seed=11, steps=8000)


def random_operations_on_three_sites(seed):
    cluster = Cluster(3)
    random_test([site.mountpoint for site in cluster], seed, steps=4000)


def every_kind_of_application_on_three_sites():
    cluster = Cluster(3)
    everything = Everything([site.mountpoint for site in cluster])
    time.sleep(6)
    everything.stop()
    for site in cluster.sites[1:]:
        assert_equal(cluster[0].mountpoint, site.mountpoint, SAME_FILE_SYSTEM_SEEN)


def what_was_acknowledged_is_seen():
    cluster = Cluster(3)
    seen = Seen([site.mountpoint for site in cluster])
    time.sleep(6)
    seen.stop()


def adopting_leaves_the_files_where_they_are():
    disk = sandbox.ext4()
    os.mkdir(f'{disk}/alpha')
    content.small(f'{disk}/alpha')
    before = digest(f'{disk}/alpha', SAME_FILE_SYSTEM_SEEN)
    cluster = Cluster(1, disk=disk)
    alpha = cluster[0]
    root = b''
    seen = digest(alpha.mountpoint, SAME_CONTENT)
    adopted = digest(alpha.store, SAME_FILE_SYSTEM_SEEN)
    for tree in (before, adopted, seen):
        tree.pop(root)  # the private area appears in the root directory, so its times move
    assert_same({p: {k: e[k] for k in e if k in SAME_CONTENT} for p, e in before.items()}, seen, 'another tree is shown')
    assert_same(before, adopted, 'adopting changed the files themselves')
    assert '.sharefs' not in os.listdir(alpha.mountpoint)
    actor = Actor(alpha.mountpoint)
    for operation in (('lstat', '.sharefs'), ('mkdir', '.sharefs'), ('list', '.sharefs'), ('unlink', '.sharefs'),
                      ('rename', 'special', '.sharefs'), ('put', '.sharefs/x', b'')):
        assert actor.do(*operation)[0] == 'errno', f'{operation} reaches the private area'
    Actor(alpha.mountpoint).do('put', 'written', b'through the mount')
    actor.close()
    alpha.stop()
    refused = alpha.cli('mount', DATA_SET, alpha.mountpoint, '-o', 'noatime,nonsense', check=False)
    assert refused.returncode != 0 and refused.stderr.endswith('does not know -o nonsense\n'), refused
    with open(f'{alpha.store}/written') as f:
        assert f.read() == 'through the mount', 'the store is not a plain directory'
    alpha.start(options=('-o', 'defaults,_netdev,nofail,x-systemd.automount,strictatime,noexec'))  # as in a line of fstab
    with open('/proc/self/mountinfo') as f:
        assert any(f' {alpha.mountpoint} ' in line and {'noexec', 'relatime'} & set(line.split()[5].split(',')) == {'noexec'} for line in f), 'the options were left out'


def a_strangers_file_in_an_old_image_is_not_lost():
    """What somebody puts into the store of a site that is not the owner would vanish with the next handoff."""
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    alpha.migrate(beta, '--max-pause', '2s')
    alpha.stop()
    stray = f'{alpha.store}/stray'
    with open(stray, 'w') as f:
        f.write('precious')
    refused = alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False)
    assert refused.returncode != 0 and stray in refused.stderr and refused.stderr.count('\n') == 1, refused
    assert open(stray).read() == 'precious'
    os.remove(stray)
    alpha.start()
    beta.migrate(alpha, '--max-pause', '2s')
    cluster.verify(alpha, beta)


def a_handle_is_followed_below_a_store_that_is_mounted_over():
    """As an NFS server does it. From below, the directory above is the mount."""
    alpha, = Cluster(1, content=lambda store: os.makedirs(f'{store}/a/b'))
    alpha.stop()
    alpha.start(at=alpha.store)
    handles = {path: file_handle(f'{alpha.store}/{path}') for path in ('a', 'a/b')}
    for path, handle in reversed(handles.items()):
        with open('/proc/sys/vm/drop_caches', 'w') as f:
            f.write('2')
        time.sleep(1.2)  # what the kernel knows of the root has run out
        found = open_by_handle(alpha.store, handle)
        assert os.path.samestat(os.fstat(found), os.stat(f'{alpha.store}/{path}')), path
        assert os.readlink(f'/proc/self/fd/{found}') == f'{alpha.store}/{path}', path
        os.close(found)


def mounted_over_the_store_itself():
    disk = sandbox.ext4()
    os.mkdir(f'{disk}/alpha')
    content.small(f'{disk}/alpha')
    before = digest(f'{disk}/alpha', SAME_CONTENT)
    before.pop(b'')
    holder = subprocess.Popen(['sleep', '100'], stdin=open(f'{disk}/alpha/dir0/sub0/file0'))
    cluster = Cluster(2, disk=disk, mount=False)
    alpha, beta = cluster
    try:
        alpha.start(at=alpha.store)
        assert str(holder.pid) in alpha.tail(), 'the process that bypasses the mount is not named'
    finally:
        holder.kill()
        holder.wait()
    cluster.join(beta)
    beta.start(at=beta.store)
    for site in cluster:
        seen = digest(site.store, SAME_CONTENT)
        seen.pop(b'')
        assert_same(before, seen, f'{site.name} shows another tree')
    # A killed daemon's mount hides its store.
    alpha.signal(signal.SIGKILL)
    alpha.process.wait()
    alpha.process = None
    alpha.cli('mount', DATA_SET, alpha.store)
    alpha.cli('umount', DATA_SET)
    alpha.start(at=alpha.store)
    cluster.wait_connected()
    load = Load('writer', dir=alpha.store, id='w', expect=f'{sandbox.WORK}/w', rate=300)
    alpha.migrate(beta, '--max-pause', '2s')
    beta.migrate(alpha, '--max-pause', '2s')
    load.stop()
    once('verify-writer', dir=beta.store, id='w', expect=f'{sandbox.WORK}/w')
    cluster.verify(alpha, beta)
    assert f'the files are on alpha, not in {beta.store}' in beta.stop()
    alpha.stop()
    assert os.path.exists(f'{alpha.store}/dir0'), 'the files are not in the store after unmounting'


def a_store_that_was_moved_is_found_by_a_link():
    """Also below the mount of a killed daemon."""
    cluster = Cluster(2, content=lambda store: content.write(f'{store}/file', b'moved'))
    alpha, beta = cluster
    alpha.stop()
    place = f'{alpha.store}.place'
    os.rename(alpha.store, place)
    os.symlink(place, alpha.store)
    alpha.cli('mount', DATA_SET, alpha.store)
    kill_in_background(alpha)
    assert 'hidden' not in alpha.cli('mount', DATA_SET, alpha.store).stderr
    with open(f'{alpha.store}/file') as file:
        assert file.read() == 'moved'
    alpha.migrate(beta)
    assert f'the files are on beta, not in {alpha.store}' in alpha.cli('umount', DATA_SET).stderr
    assert place not in sandbox.fuse_mounts() and os.listdir(place) == ['.sharefs'], os.listdir(place)


def kill_in_background(site):
    """The daemon that the command line started."""
    pid = site.status()['pid']
    os.kill(pid, signal.SIGKILL)
    sandbox.eventually(lambda: sandbox.reap() or not os.path.exists(f'/proc/{pid}'), 'it has ended', every=0.001)


def a_mount_takes_the_place_of_a_dead_one():
    """Who goes on meanwhile gets errors, and does not find the bare directory below."""
    cluster = Cluster(1, mount=False)
    alpha, = cluster
    alpha.cli('mount', DATA_SET, alpha.mountpoint)
    writer = """
import os, sys
while True:
    try:
        os.close(os.open(sys.argv[1] + '/file', os.O_WRONLY | os.O_CREAT))
    except OSError:
        pass
"""
    application = subprocess.Popen([sys.executable, '-c', writer, alpha.mountpoint])
    try:
        for _ in range(3):
            sandbox.eventually(lambda: os.path.exists(f'{alpha.mountpoint}/file'), 'the application writes')
            os.remove(f'{alpha.mountpoint}/file')
            kill_in_background(alpha)
            sandbox.eventually(lambda: alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False).returncode == 0, 'it is mounted')
        assert len([m for m in sandbox.fuse_mounts() if m == alpha.mountpoint]) == 1, sandbox.mounts()
    finally:
        application.kill()
        application.wait()
        alpha.cli('umount', DATA_SET)
    if sandbox.kernel() >= (6, 5):  # before, there is an instant between the dead mount and the new one
        assert os.listdir(alpha.mountpoint) == [], 'an application has written into the directory below the mount'
    assert os.path.exists(f'{alpha.store}/file')


def a_dead_mount_is_known_by_more_than_its_attributes():
    """Which the kernel shows for a while after the daemon was killed."""
    cluster = Cluster(1, mount=False)
    alpha, = cluster
    for _ in range(3):
        alpha.cli('mount', DATA_SET, alpha.mountpoint)
        os.stat(alpha.mountpoint)
        kill_in_background(alpha)
        alpha.cli('mount', DATA_SET, alpha.mountpoint)
        alpha.cli('umount', DATA_SET)


def a_refused_mount_leaves_the_dead_one(user=None):
    """Its users get errors, which is better than an empty directory. An ordinary user cannot leave it over the store."""
    cluster = Cluster(2, user=user)
    alpha, beta = cluster
    alpha.stop()

    def refused(at):
        beta.signal(signal.SIGKILL)
        beta.process.wait()
        beta.process = None
        result = beta.cli('mount', DATA_SET, at, '--timeout', '1s', check=False)
        assert result.returncode == 1 and 'does not answer within --timeout' in result.stderr, result
        return result.stderr

    assert 'nothing is mounted' not in refused(beta.mountpoint)
    assert beta.mountpoint in sandbox.fuse_mounts() and beta.status()['dead_mountpoint'] == beta.mountpoint
    alpha.start()
    beta.start(at=beta.store)
    assert beta.mountpoint not in sandbox.fuse_mounts(), 'the dead mount stays where it was mounted before'
    alpha.stop()
    taken_away = 'nothing is mounted over the store now' in refused(beta.store)
    assert taken_away == (user is not None) == (beta.store not in sandbox.fuse_mounts()), (taken_away, sandbox.mounts())
    alpha.start()
    if user is None:
        beta.cli('mount', DATA_SET, beta.store)
        assert sandbox.fuse_mounts().count(beta.store) == 1, sandbox.mounts()
        beta.cli('umount', DATA_SET)
        assert os.listdir(beta.store) == ['.sharefs'], os.listdir(beta.store)
    beta.start()


def mount_without(capability, site, at):
    command = site.command('mount', DATA_SET, at)
    command[-4:-4] = ['setpriv', '--bounding-set', f'-{capability}']
    return subprocess.run(command, env=site.environment(), capture_output=True, text=True)


def a_dead_mount_that_cannot_be_set_aside_is_named():
    """By a root that may not mount, as in many containers."""
    cluster = Cluster(1)
    alpha, = cluster
    alpha.stop()
    alpha.cli('mount', DATA_SET, alpha.store)
    kill_in_background(alpha)
    mount = mount_without('sys_admin', alpha, alpha.store)
    assert mount.returncode == 1 and 'cannot be set aside: Operation not permitted' in mount.stderr, mount
    alpha.cli('umount', DATA_SET)


def a_root_that_cannot_act_for_others_is_told_so_before_it_serves():
    cluster = Cluster(1)
    alpha, = cluster
    alpha.stop()
    mount = mount_without('setpcap', alpha, alpha.mountpoint)
    assert mount.returncode == 1 and 'root without CAP_SETPCAP cannot serve others' in mount.stderr, mount
    assert mount.stderr.count('\n') == 1 and not sandbox.fuse_mounts(), (mount, sandbox.mounts())
    alpha.start()


def a_mount_that_is_interrupted_does_not_come_later():
    cluster = Cluster(2)
    alpha, beta = cluster
    beta.stop()
    alpha.stop()
    mount = subprocess.Popen(beta.command('mount', DATA_SET, beta.mountpoint), env=beta.environment())
    sandbox.eventually(lambda: beta.phase() != 'not running', 'the daemon starts')
    mount.send_signal(signal.SIGINT)
    mount.wait(10)
    sandbox.eventually(lambda: beta.phase() == 'not running', 'it has ended', timeout=5)
    alpha.start()
    beta.start()


def setuid_that_a_write_has_ended_is_not_in_effect_any_more():
    """The kernel keeps the mode of a file, also for exec: a stat that asks for the mode alone tells what it believes."""
    cluster = Cluster(1)
    alpha, = cluster
    path = f'{alpha.mountpoint}/f'
    somebody = ['setpriv', '--reuid', str(sandbox.TESTER), '--regid', str(sandbox.TESTER), '--clear-groups']
    dd = ['dd', 'if=/dev/zero', f'of={path}', 'count=1', 'conv=notrunc']
    for mode, kept in ((0o6666, 0o666), (0o6676, 0o676), (0o4666, 0o666)):
        for change in ([*dd, 'bs=100'], [*dd, 'bs=100', 'oflag=append'], [*dd, 'bs=4096', 'oflag=direct'], ['fallocate', '-l', '5000', path]):
            content.write(path, b'x')
            os.chmod(path, mode)
            sandbox.run(*somebody, *change)
            shown = int(sandbox.run('stat', '-c', '%a', path).stdout, 8)
            assert shown == kept, f'{change} by somebody else: {mode:o} has become {shown:o}'


def a_mount_waits_for_the_end_of_the_one_before():
    """Which umount(8) does not."""
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    for site in (beta, alpha):
        site.stop()
    for cycle in range(5):
        for site in cluster:
            site.cli('mount', DATA_SET, site.mountpoint)
            with open(f'{site.mountpoint}/{site.name}{cycle}', 'wb') as f:
                f.write(bytes(1 << 20))
        for site in (beta, alpha):
            sandbox.run('umount', site.mountpoint)
    for site in cluster:
        site.cli('mount', DATA_SET, site.mountpoint)
    refused = alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False)
    assert refused.returncode == 1 and 'already mounted or served by process' in refused.stderr, refused
    for site in (beta, alpha):
        site.cli('umount', DATA_SET)
    # It is asked as soon as it can know.
    alpha.start()
    alpha.signal(signal.SIGSTOP)
    assert libc.umount2(alpha.mountpoint.encode(), 0) == 0  # umount(8) would look at it first
    again = subprocess.Popen(alpha.command('mount', DATA_SET, alpha.mountpoint), env=alpha.environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    alpha.signal(signal.SIGCONT)
    said = again.communicate(timeout=60)[1]
    assert again.returncode == 0, said
    alpha.process.wait(30)
    alpha.process = None
    alpha.cli('umount', DATA_SET)


def mount_8_mounts_it():
    """By its helper, as from fstab; and changes the flags of a mount."""
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    alpha.stop()
    helper = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', '..', 'packaging', 'mount.sharefs')
    os.makedirs(f'{sandbox.WORK}/prefix/bin')
    os.makedirs(f'{sandbox.WORK}/prefix/sbin')
    os.symlink(SHAREFS, f'{sandbox.WORK}/prefix/bin/sharefs')
    shutil.copy(helper, f'{sandbox.WORK}/prefix/sbin/mount.sharefs')
    sandbox.overlay('/usr/sbin')
    for name in ('mount.sharefs', 'mount.fuse.sharefs'):
        os.symlink(f'{sandbox.WORK}/prefix/sbin/mount.sharefs', f'/usr/sbin/{name}')
    with open(f'{sandbox.WORK}/fstab', 'w') as f:
        f.write(f'{DATA_SET} {alpha.mountpoint} sharefs nosuid,user,_netdev,nofail,x-systemd.automount 0 0\n')

    def mount(*words, check=True):
        command = [*cluster.network.inside(alpha.name), 'mount', '--fstab', f'{sandbox.WORK}/fstab', *words]
        return sandbox.run(*command, env=alpha.environment(), check=check)
    mount('-a')
    mount('-a')
    shown = sandbox.run('findmnt', '-n', '-o', 'FSTYPE,SOURCE,OPTIONS', alpha.mountpoint).stdout.split()
    assert shown[:2] == ['fuse.sharefs', DATA_SET] and 'nosuid' in shown[2].split(','), shown
    with open(f'{alpha.mountpoint}/there', 'x'):
        pass
    mount('-o', 'remount,ro', alpha.mountpoint)
    try:
        os.unlink(f'{alpha.mountpoint}/there')
        raise AssertionError('removed from a mount that is for reading only')
    except OSError as error:
        assert error.errno == errno.EROFS, error
    os.unlink(f'{beta.mountpoint}/there')
    mount('-o', 'remount,rw', alpha.mountpoint)
    with open(f'{alpha.mountpoint}/again', 'x'):
        pass
    assert os.path.exists(f'{beta.mountpoint}/again')
    refused = mount('-t', 'sharefs', 'unknown', alpha.store, check=False)
    assert refused.returncode == 32 and 'no data set "unknown"' in refused.stderr, refused
    sandbox.run('umount', alpha.mountpoint)


def a_mount_point_is_his_who_has_it_now():
    """One that had it before, and was killed, is not asked for it."""
    cluster = Cluster(1, mount=False)
    alpha, = cluster
    alpha.cli('mount', DATA_SET, alpha.mountpoint)
    kill_in_background(alpha)
    sandbox.run('umount', alpha.mountpoint)
    other = f'{sandbox.WORK}/other'
    os.mkdir(other)
    alpha.cli('init', 'e', '--store', other)
    alpha.cli('mount', 'e', alpha.mountpoint)
    assert 'dead_mountpoint' not in alpha.status(), alpha.status()
    alpha.cli('umount', alpha.mountpoint)
    assert alpha.mountpoint not in sandbox.fuse_mounts()


def a_daemon_that_hangs_holds_nobody_up():
    """Its mount covers the store, where status must not look. In the end it has as many callers as may wait for it."""
    cluster = Cluster(2, mount=False)
    alpha, _ = cluster
    alpha.start(at=alpha.store)
    alpha.signal(signal.SIGSTOP)
    try:
        for _ in range(2):
            shown = alpha.cli('status', DATA_SET, timeout=30).stdout
            assert f'process {alpha.process.pid} ' in shown, shown
            result = alpha.cli('umount', DATA_SET, check=False)
            assert result.returncode == 1 and f'kill process {alpha.process.pid} ' in result.stderr, result
            migration = alpha.migrate_in_background(alpha)
            time.sleep(1)
            migration.process.send_signal(signal.SIGINT)
            summary = migration.finish(check=False, timeout=5)
            assert summary['exit'] == 1 and 'interrupted before anything was begun' in summary['error'], summary
            result = alpha.cli('verify', DATA_SET, '--with', 'beta', check=False, timeout=30)
            assert result.returncode == 1 and 'does not answer' in result.stderr, result
            _call_until_nobody_can(f'{alpha.home}/{DATA_SET}/control.sock')
    finally:
        alpha.signal(signal.SIGCONT)


def _call_until_nobody_can(path):
    """A caller that has gone keeps its place among those that wait."""
    for _ in range(1000):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.setblocking(False)
            try:
                caller.connect(path)
            except BlockingIOError:
                return
    raise AssertionError('any number of callers may wait')


def who_ignores_the_end_of_children_is_told_the_truth():
    """As the starter's disposition of SIGCHLD is inherited, what a child of a command came to could not be known."""
    cluster = Cluster(1, user=sandbox.TESTER)
    alpha = cluster[0]
    alpha.stop()

    def ignoring(*words):
        return sandbox.run(*alpha.command(*words), env=alpha.environment(), check=False,
                           preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))

    mounted = ignoring('mount', DATA_SET, alpha.mountpoint)
    assert mounted.returncode == 0 and mounted.stderr == '', mounted
    actor = Actor(alpha.mountpoint, sandbox.TESTER)
    assert actor.do('put', 'f', b'x')[0] == actor.do('open', 1, 'f', os.O_RDONLY)[0] == 'ok'
    refused = ignoring('umount', DATA_SET)
    assert refused.returncode == 1 and 'is busy' in refused.stderr, refused
    actor.close()
    ended = ignoring('umount', DATA_SET)
    assert ended.returncode == 0 and ended.stderr == '', ended


def a_store_has_one_daemon():
    """Whichever state folder it has: two would be two owners of the same files."""
    cluster = Cluster(2)
    alpha, beta = cluster
    other = f'{sandbox.WORK}/other'
    os.mkdir(other)

    def refused(store, *words):
        result = beta.cli('--home', f'{other}/home', *words, check=False)
        assert result.returncode == 1 and f'{store} is the store of a running daemon' in result.stderr, result

    refused(beta.store, 'join', cluster.invite(), '--store', beta.store, '--site', 'gamma',
            '--listen', f'tcp://{beta.address}:7200')
    for directory in ('store', 'one', 'two'):
        os.mkdir(f'{other}/{directory}')
    alpha.cli('init', 'alone', '--store', f'{other}/store')
    alpha.cli('mount', 'alone', f'{other}/one')
    shutil.copytree(alpha.home, f'{other}/home', ignore=shutil.ignore_patterns('*.sock', DATA_SET))
    refused(f'{other}/store', 'mount', 'alone', f'{other}/two')
    alpha.cli('umount', 'alone')
    # A store below its own mount is one, too.
    alpha.stop()
    alpha.start(at=alpha.store)
    result = alpha.cli('init', 'around', '--store', os.path.dirname(alpha.store), check=False)
    assert result.returncode == 1 and f'holds {alpha.store}' in result.stderr, result
    alpha.migrate(beta)
    cluster.verify(alpha, beta)


def what_is_stored_in_a_mapping_is_seen_everywhere_after_msync():
    """And no other site's older page destroys it."""
    cluster = Cluster(3)
    with open(f'{cluster[0].mountpoint}/page', 'wb') as f:
        f.write(b'.' * 8192)
    actors = [Actor(site.mountpoint) for site in cluster]
    for actor in actors:
        assert actor.do('open', 1, 'page', os.O_RDWR)[0] == 'ok' and actor.do('share', 1, 8192)[0] == 'ok'
    expected = bytearray(b'.' * 8192)
    for i in range(30):
        for actor in actors:
            for seen in (actor.do('mapped', 0, 8192), actor.do('pread', 1, 8192, 0)):
                assert seen == ('ok', bytes(expected)), f'round {i}: {seen[1][:400]}'
        data = b'%03d' % i
        expected[10 * i:10 * i + 3] = data
        writer = actors[i % 3]
        assert writer.do('store', 10 * i, data)[0] == 'ok' and writer.do('msync')[0] == 'ok'
    # Both write back one page at once: whose page comes later stays, and nobody waits for the other.
    start = time.monotonic()
    for i in range(20):
        for number, actor in enumerate(actors[:2]):
            assert actor.do('store', 4096 + number, b'%d' % (i % 10))[0] == 'ok'
        for actor in actors[:2]:
            actor.send('msync')
        for actor in actors[:2]:
            assert actor.receive()[0] == 'ok'
    assert time.monotonic() - start < 4, 'they waited for each other until a lease ended'


def locks_of_an_open_file_description_end_with_it():
    """F_OFD_SETLK: neither a close of another descriptor ends them, nor does anything but the last one."""
    cluster = Cluster(2)
    with open(f'{cluster[0].mountpoint}/f', 'wb') as f:
        f.write(b'x')
    lock = struct.pack('hhqqi4x', fcntl.F_WRLCK, 0, 0, 10, 0)
    for holder, other in (cluster.sites, reversed(cluster.sites)):
        first = os.open(f'{holder.mountpoint}/f', os.O_RDWR)
        copy = os.dup(first)
        fcntl.fcntl(first, fcntl.F_OFD_SETLK, lock)
        os.close(first)
        with open(f'{other.mountpoint}/f', 'r+b') as rival:
            try:
                fcntl.fcntl(rival, fcntl.F_OFD_SETLK, lock)
                raise AssertionError('two hold one lock')
            except BlockingIOError:
                pass
            os.close(copy)
            sandbox.eventually(lambda: _can_lock(rival, lock), 'the lock is free', timeout=3)


def _can_lock(file, lock):
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        return True
    except BlockingIOError:
        return False


def stores_in_a_mapping_are_data_and_older_than_a_time_that_is_set():
    """SEEK_DATA of another process finds them; and writing them back does not undo utimes."""
    cluster = Cluster(2)
    for site in cluster:
        path = f'{site.mountpoint}/{site.name}'
        with open(path, 'wb') as file:
            file.truncate(1 << 20)
        with open(path, 'rb') as file:
            file.read(10)  # from now on the kernel keeps the pages that it has when the file is opened
        with open(path, 'r+b') as file, mmap.mmap(file.fileno(), 1 << 20) as mapped, open(path, 'rb') as other:
            mapped[500000:500005] = b'hello'
            assert os.lseek(other.fileno(), 0, os.SEEK_DATA) == 499712, site.name
            mapped[500000:500005] = b'HELLO'
            os.utime(path, (5, 5))
            mapped.flush()
            os.fsync(file.fileno())
            assert os.stat(path).st_mtime == 5, site.name
            assert os.pread(other.fileno(), 5, 500000) == b'HELLO'


def a_mapping_of_an_append_handle_is_one_as_any_other():
    """Such a handle passes by the pages of the kernel; a mapping of it does not."""
    cluster = Cluster(2)
    for site in cluster:
        path = f'{site.mountpoint}/{site.name}'
        content.write(path, b'data' + bytes(1 << 20))
        with open(path, 'r+b'):
            pass  # from now on there may be stored pages
        handle = os.open(path, os.O_RDWR | os.O_APPEND)
        with mmap.mmap(handle, 1 << 20, access=mmap.ACCESS_COPY) as mapped:
            assert mapped[:4] == b'data'
            os.write(handle, b'more')
            assert mapped[4096:4100] == bytes(4)
        os.close(handle)
        with open(f'{path}.empty', 'wb') as file:
            file.truncate(1 << 20)
        handle = os.open(f'{path}.empty', os.O_RDWR | os.O_APPEND)
        try:
            mapped = mmap.mmap(handle, 1 << 20)
        except OSError as error:
            assert error.errno == errno.ENODEV  # before Linux 6.6
        else:
            with mapped, open(f'{path}.empty', 'rb') as other:
                mapped[500000:500005] = b'hello'
                assert os.lseek(other.fileno(), 0, os.SEEK_DATA) == 499712, site.name
                mapped[500000:500005] = b'HELLO'
                os.utime(f'{path}.empty', (5, 5))
                mapped.flush()
                assert os.stat(f'{path}.empty').st_mtime == 5, site.name
        os.close(handle)


def stores_on_their_way_are_older_than_what_is_done_since():
    """However many there are: every other page is a request of its own."""
    pages = range(0, 4 << 20, 8192)
    cluster = Cluster(2)
    alpha, beta = cluster
    with open(f'{alpha.mountpoint}/f', 'wb') as file:
        file.truncate(4 << 20)
    with open(f'{beta.mountpoint}/f', 'r+b') as file, mmap.mmap(file.fileno(), 4 << 20) as mapped, \
            open(f'{alpha.mountpoint}/f', 'r+b', buffering=0) as other:
        for page in pages:
            mapped[page]  # is read before the link is slow
        cluster.network.slow('beta', 8000)

        def store(data):
            for page in pages:
                mapped[page:page + 5] = data
            assert libc.sync_file_range(file.fileno(), ctypes.c_long(0), ctypes.c_long(0), SYNC_FILE_RANGE_WRITE) == 0

        store(b'hello')
        os.utime(f'{beta.mountpoint}/f', (5, 5))
        mapped.flush()
        os.fsync(file.fileno())
        assert os.stat(f'{beta.mountpoint}/f').st_mtime == 5
        store(b'HELLO')
        assert os.pwrite(other.fileno(), b'world', pages[-1] + 5) == 5
        mapped.flush()
        os.fsync(file.fileno())
        assert os.pread(other.fileno(), 10, pages[-1]) == b'HELLOworld'
        assert os.pread(other.fileno(), 5, pages[0]) == b'HELLO'


def stores_in_a_mapping_are_there_for_who_passes_by_the_pages():
    """O_APPEND and O_DIRECT: what they read holds the stores, what they write is newer."""
    cluster = Cluster(2)
    for site in cluster:
        path = f'{site.mountpoint}/{site.name}'
        with open(path, 'wb') as file:
            file.truncate(6000)
        appending = os.open(path, os.O_RDWR | os.O_APPEND)
        direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        aligned = mmap.mmap(-1, 4096)
        with open(path, 'r+b') as file, mmap.mmap(file.fileno(), 6000) as mapped:
            mapped[0:5] = b'hello'
            assert os.pread(appending, 5, 0) == b'hello', site.name
            mapped[0:5] = b'HELLO'
            assert os.preadv(direct, [aligned], 0) == 4096 and aligned[:5] == b'HELLO', site.name
            mapped[0:5] = b'older'
            aligned[:] = b'newer' + bytes(4091)
            assert os.pwrite(direct, aligned, 0) == 4096
            mapped[5000:5005] = b'store'
            assert os.write(appending, b'tail') == 4
            mapped.flush()
            with open(path, 'rb') as other:
                seen = other.read()
            assert (seen[:5], seen[5000:5005], seen[6000:]) == (b'newer', b'store', b'tail'), f'{site.name}: {seen}'
            assert mapped[:5] == b'newer'
        os.close(appending)
        os.close(direct)


def umount_takes_away_nothing_but_the_mount():
    """It goes on in another mount namespace or in an open file, while the disk of the store is what is at its path."""
    cluster = Cluster(1, content=content.small)
    alpha, = cluster
    alpha.stop()
    sandbox.run('mount', '--bind', alpha.store, alpha.store)
    try:
        for how in ('namespace', 'lazy', 'by hand'):
            alpha.start(at=alpha.store)
            assert len([m for m in sandbox.mounts() if alpha.store in m]) == 2, sandbox.mounts()
            command = ['sleep', '100']
            if how == 'namespace':
                command = ['unshare', '--mount', '--propagation', 'private', *command]
            holder = subprocess.Popen(command, cwd='/' if how == 'namespace' else alpha.store)
            try:
                if how == 'namespace':
                    ours = os.readlink('/proc/self/ns/mnt')
                    sandbox.eventually(lambda: os.readlink(f'/proc/{holder.pid}/ns/mnt') != ours, 'another namespace')
                else:
                    sandbox.eventually(lambda: os.path.exists(f'/proc/{holder.pid}/cwd'), 'the holder runs')
                if how == 'by hand':
                    sandbox.run('umount', '-l', alpha.store)
                alpha.cli('umount', DATA_SET, *(['--lazy'] if how == 'lazy' else []))
                alpha.process.wait(30)
                alpha.process = None
            finally:
                holder.kill()
                holder.wait()
            assert len([m for m in sandbox.mounts() if alpha.store in m]) == 1, (how, sandbox.mounts())
    finally:
        sandbox.run('umount', alpha.store)


def empty_directories_that_were_tidied_away_are_made_again():
    """Between two mounts a store is a plain directory, on which any tool may be let loose."""
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    for to in (beta, alpha):
        for site in (beta, alpha):
            site.stop()
            sandbox.run('find', f'{site.store}/.sharefs', '-type', 'd', '-empty', '-delete')
            assert not os.path.exists(f'{site.store}/.sharefs/orphans')
        for site in sorted(cluster, key=lambda site: site is to):  # the owner first
            site.start()
        with open(f'{beta.mountpoint}/gone', 'w') as f:
            os.remove(f.name)
            f.write('x')
        cluster.wait_connected()
        cluster.hand_over_and_compare(to, '--max-pause', '2s')


def a_busy_mount_says_what_is_mounted_in_it():
    """And not what lies in the store below it, which keeps nobody from unmounting."""
    cluster = Cluster(1, content=lambda store: [os.mkdir(f'{store}/{name}') for name in ('in', 'below')])
    alpha, = cluster
    alpha.stop()
    sandbox.run('mount', '-t', 'tmpfs', 'tmpfs', f'{alpha.store}/below')
    alpha.start(at=alpha.store)
    sandbox.run('mount', '-t', 'tmpfs', 'tmpfs', f'{alpha.store}/in')
    with subprocess.Popen(['sleep', '100'], cwd=alpha.store) as holder:
        try:
            sandbox.eventually(lambda: os.path.exists(f'/proc/{holder.pid}/cwd'), 'the holder runs')
            refused = alpha.cli('umount', DATA_SET, check=False)
        finally:
            holder.kill()
    assert refused.returncode == 1 and refused.stderr.count('\n') == 1, refused
    assert f'mounted in it: {alpha.store}/in;' in refused.stderr and f'{holder.pid} (' in refused.stderr, refused
    sandbox.run('umount', f'{alpha.store}/in')
    alpha.stop()
    sandbox.run('umount', f'{alpha.store}/below')


def a_restart_keeps_inode_numbers():
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    before = digest(alpha.mountpoint, SAME_FILE_SYSTEM_SEEN)
    actor = Actor(alpha.mountpoint)
    for i in range(200):
        actor.do('put', f'late{i}', b'x')
        actor.do('rename', f'late{i}', f'later{i}')
    actor.close()
    late = digest(alpha.mountpoint, SAME_FILE_SYSTEM_SEEN)
    alpha.kill()
    alpha.start()
    assert_same(late, digest(alpha.mountpoint, SAME_FILE_SYSTEM_SEEN), 'after a kill')
    assert_same(late, digest(beta.mountpoint, SAME_FILE_SYSTEM_SEEN), 'after a kill, on the other site')
    alpha.stop()
    alpha.start()
    assert_same(late, digest(alpha.mountpoint, SAME_FILE_SYSTEM_SEEN), 'after a restart')
    assert all(late[path] == entry for path, entry in before.items() if path)


def another_site_waits_for_the_owner():
    cluster = Cluster(2)
    alpha, beta = cluster
    loads = [Load('writer', dir=beta.mountpoint, id='w', expect=f'{sandbox.WORK}/w', rate=200, sync_every=10),
             Load('appender', file=f'{beta.mountpoint}/f', id='a', rate=200),
             Load('creator', dir=beta.mountpoint, id='c', rate=200),
             Load('stat-holder', dir=beta.mountpoint, id='h'),
             Load('open-unlinked', dir=beta.mountpoint, id='u', rate=100),
             Load('lock-counter', file=f'{beta.mountpoint}/l', id='l', rate=50)]
    for event in ('cut', 'kill', 'stop', 'cut'):
        time.sleep(1)
        if event == 'cut':
            cluster.network.cut('alpha')
            time.sleep(2.5)
            cluster.network.heal('alpha')
        else:
            getattr(alpha, event)()
            time.sleep(1)
            alpha.start()
    time.sleep(1)
    results = [load.stop() for load in loads]
    once('verify-writer', dir=alpha.mountpoint, id='w', expect=f'{sandbox.WORK}/w')
    once('verify-appender', file=f'{alpha.mountpoint}/f', count=f'a={results[1]["records"]}')


def a_mount_as_a_service_waits_for_the_owner():
    """Machines start in any order; what is ordered behind the service finds the mount."""
    cluster = Cluster(2, content=lambda store: content.write(f'{store}/f', b'x'))
    alpha, beta = cluster
    alpha.stop()
    beta.stop()
    where = f'{sandbox.WORK}/notify'
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(where)
        with open(beta.log, 'a') as log:
            beta.process = subprocess.Popen(beta.command('mount', DATA_SET, beta.mountpoint, '-f'),
                                            env={**beta.environment(), 'NOTIFY_SOCKET': where}, stdout=log, stderr=log)
        sandbox.eventually(lambda: 'waiting: the owner alpha cannot be reached' in beta.tail(), 'it says what it waits for')
        shown = beta.status()
        assert (shown['mountpoint'], shown['wanted_mountpoint']) == ('', beta.mountpoint), shown
        assert f'not yet, {beta.mountpoint} waits for alpha' in beta.cli('status').stdout
        manager.setblocking(False)
        try:
            raise AssertionError(f'{manager.recv(100)} is told before anything is mounted')
        except BlockingIOError:
            pass
        alpha.start()
        manager.settimeout(20 * sandbox.PATIENCE)
        assert manager.recv(100) == b'READY=1'
        with open(f'{beta.mountpoint}/f') as f:
            assert f.read() == 'x'
    # It ends while it waits, too.
    alpha.stop()
    beta.kill()
    beta.process = subprocess.Popen(beta.command('mount', DATA_SET, beta.mountpoint, '-f'), env=beta.environment(),
                                    stderr=subprocess.DEVNULL)
    sandbox.eventually(lambda: beta.status()['running'], 'it answers')
    beta.signal(signal.SIGTERM)
    assert beta.process.wait(20) == 0
    beta.process = None


def a_slow_link_is_only_slow():
    """A request or an answer takes longer than a site may be silent: it arrives all the same, once."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/{i}', bytes(1 << 20)) for i in range(3)])
    alpha, beta = cluster
    cluster.wait_connected()
    for site in cluster:
        cluster.network.slow(site.name, 2000)
    sandbox.run('timeout', 40, 'dd', 'if=/dev/zero', f'of={beta.mountpoint}/f', 'bs=1M', 'count=2')
    readers = [subprocess.Popen(['dd', f'if={beta.mountpoint}/{i}', 'of=/dev/null', 'bs=1M', 'iflag=direct', 'status=none'])
               for i in range(3)]
    for reader in readers:
        assert reader.wait(40) == 0
    for site in cluster:
        cluster.network.slow(site.name, 10 ** 6)


def who_is_cut_off_is_shown_nothing_old():
    """The owner does not wait for ever for a site that is away: that site's kernel must not answer by itself then."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/{name}', b'old') for name in 'fgh'])
    alpha, beta = cluster
    cut_off, other, lookers = Actor(beta.mountpoint), Actor(alpha.mountpoint), [Actor(beta.mountpoint) for _ in range(3)]
    assert cut_off.do('open', 1, 'f', os.O_RDONLY)[0] == 'ok' and cut_off.do('pread', 1, 3, 0) == ('ok', b'old')
    assert cut_off.do('open', 2, 'g', os.O_RDONLY)[0] == 'ok' and cut_off.do('map', 2, 3)[0] == 'ok'
    assert cut_off.do('mapped', 0, 3) == ('ok', b'old')
    assert cut_off.do('content', 'h') == ('ok', b'old') and cut_off.do('close', 2)[0] == 'ok'
    cluster.network.cut('alpha')
    for name in 'fgh':
        assert other.do('open', name, name, os.O_WRONLY)[0] == 'ok' and other.do('pwrite', name, b'new', 0) == ('ok', 3)
    cut_off.send('pread', 1, 3, 0)
    lookers[0].send('content', 'h')
    lookers[1].send('stat', 'h')
    time.sleep(1)
    cluster.network.heal('alpha')
    assert cut_off.receive() == ('ok', b'new'), 'pages of an open file'
    assert lookers[0].receive() == ('ok', b'new') and lookers[1].receive()[0] == 'ok'
    assert cut_off.do('mapped', 0, 3) == ('ok', b'new')


def who_is_behind_a_slow_link_is_shown_nothing_old():
    """It is heard all the time, but what it is to drop waits behind what it reads."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/f', b'old'),
                                                *(content.write(f'{store}/{i}', bytes(1 << 20)) for i in range(4))])
    alpha, beta = cluster
    reader, other = Actor(beta.mountpoint), Actor(alpha.mountpoint)
    assert reader.do('open', 1, 'f', os.O_RDONLY)[0] == 'ok' and reader.do('pread', 1, 3, 0) == ('ok', b'old')
    assert other.do('open', 1, 'f', os.O_WRONLY)[0] == 'ok'
    cluster.network.slow('alpha', 2000)
    busy = [subprocess.Popen(['dd', f'if={beta.mountpoint}/{i}', 'of=/dev/null', 'bs=1M', 'iflag=direct', 'status=none'])
            for i in range(4)]
    time.sleep(0.5)
    assert other.do('pwrite', 1, b'new', 0, timeout=30) == ('ok', 3)
    seen = reader.do('pread', 1, 3, 0, timeout=60)
    assert seen == ('ok', b'new'), seen
    for one in busy:
        assert one.wait(60) == 0
    cluster.network.slow('alpha', 10 ** 6)


def who_is_told_late_is_waited_for():
    """What it is to drop arrives when the owner has almost waited long enough, and its kernel takes a while."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/f', b'old'), content.write(f'{store}/g', bytes(1 << 20))])
    alpha, beta = cluster
    beta.restart(faults='fuse.dropping=sleep:3000')
    cluster.wait_connected()
    reader, other = Actor(beta.mountpoint), Actor(alpha.mountpoint)
    assert reader.do('open', 1, 'f', os.O_RDONLY)[0] == 'ok'
    assert other.do('open', 1, 'f', os.O_WRONLY)[0] == 'ok' and other.do('pwrite', 1, b'OLD', 0) == ('ok', 3)
    assert reader.do('pread', 1, 3, 0) == ('ok', b'OLD')  # which promises nothing of attributes, which would be recalled first
    cluster.network.slow('alpha', 2000)
    busy = subprocess.Popen(['dd', f'if={beta.mountpoint}/g', 'of=/dev/null', 'bs=1M', 'iflag=direct', 'status=none'])
    time.sleep(0.5)
    assert other.do('pwrite', 1, b'new', 0, timeout=30) == ('ok', 3)
    seen = reader.do('pread', 1, 3, 0, timeout=30)
    assert seen == ('ok', b'new'), seen
    assert busy.wait(60) == 0
    cluster.network.slow('alpha', 10 ** 6)


def a_file_becomes_an_append_only_one_while_it_is_open():
    """As make does with its output: the kernel goes by how it was opened, and so must the answer to a write."""
    cluster = Cluster(2)
    for site in cluster:
        actor, other = Actor(site.mountpoint), Actor(cluster[0].mountpoint)
        assert actor.do('open', 1, site.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)[0] == 'ok'
        assert actor.do('write', 1, b'one') == ('ok', 3)
        assert actor.do('set_flags', 1, os.O_APPEND)[0] == 'ok'
        assert other.do('open', 2, site.name, os.O_WRONLY | os.O_APPEND)[0] == 'ok'
        for _ in range(3):
            assert actor.do('write', 1, b'two', timeout=20) == ('ok', 3)
            assert other.do('write', 2, b'too') == ('ok', 3)
        assert other.do('content', site.name) == ('ok', b'one' + b'twotoo' * 3)
        assert actor.do('pread', 1, 100, 0) == ('ok', b'one' + b'twotoo' * 3)
        assert actor.do('set_flags', 1, 0)[0] == 'ok'
        assert actor.do('pwrite', 1, b'ONE', 0) == ('ok', 3)
        assert other.do('content', site.name)[1].startswith(b'ONEtwo')


def who_cannot_reach_a_new_owner_is_shown_nothing_old():
    """It hears of the handoff from the old owner, and the new one cannot recall what it shows."""
    cluster = Cluster(3, content=lambda store: [content.write(f'{store}/{name}', b'old') for name in 'fg'])
    alpha, beta, gamma = cluster
    cut_off, other = Actor(gamma.mountpoint), Actor(alpha.mountpoint)
    assert cut_off.do('open', 1, 'f', os.O_RDONLY)[0] == 'ok' and cut_off.do('pread', 1, 3, 0) == ('ok', b'old')
    assert cut_off.do('open', 2, 'g', os.O_RDONLY)[0] == 'ok' and cut_off.do('map', 2, 3)[0] == 'ok'
    assert cut_off.do('mapped', 0, 3) == ('ok', b'old')
    cluster.network.cut('gamma', 'beta')
    sandbox.eventually(lambda: [s['connected'] for s in gamma.status()['sites'] if s['site'] == 'beta'] == [False], 'it is cut')
    alpha.migrate(beta, '--max-pause', '2s')
    for name in 'fg':
        assert other.do('open', name, name, os.O_WRONLY)[0] == 'ok' and other.do('pwrite', name, b'new', 0) == ('ok', 3)
    cut_off.send('pread', 1, 3, 0)
    time.sleep(1)
    cluster.network.heal('gamma')
    assert cut_off.receive() == ('ok', b'new'), 'pages of an open file'
    assert cut_off.do('mapped', 0, 3) == ('ok', b'new')


def callers_of_the_only_mount_can_be_killed_while_the_owner_is_away():
    """Such a mount's kernel keeps by itself, for a second, that a name is missing."""
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start(serve=True)
    cluster.join(beta)
    beta.start()
    caller = Actor(beta.mountpoint)
    time.sleep(1.5)  # it is told that it is the only one
    assert caller.do('stat', 'new') == ('errno', 'ENOENT')
    alpha.kill()
    caller.send('open', 1, 'new', os.O_RDWR | os.O_CREAT)
    time.sleep(0.5)
    caller.kill()
    caller.wait_ended()
    alpha.start(serve=True)
    other = Actor(beta.mountpoint)
    assert other.do('stat', 'new') == ('errno', 'ENOENT'), 'what a killed caller asked was performed later'


def who_is_cut_off_can_be_killed():
    """While its callers wait for the owner, with pages locked, or with stores in a mapping that are being written back; and
    other pages of their files are not shown any more."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/{name}', b'old' + bytes(16381) + b'old')
                                                for name in 'fm'])
    alpha, beta = cluster
    reader, mapper, other = Actor(beta.mountpoint), Actor(beta.mountpoint), Actor(alpha.mountpoint)
    writers = [Actor(beta.mountpoint) for _ in range(2)]
    assert other.do('open', 1, 'f', os.O_RDWR)[0] == 'ok' and mapper.do('open', 1, 'm', os.O_RDWR)[0] == 'ok'
    assert mapper.do('share', 1, 4096)[0] == 'ok'
    for actor in (reader, *writers):
        assert actor.do('open', 1, 'f', os.O_RDWR)[0] == 'ok'
    assert reader.do('pread', 1, 3, 0) == ('ok', b'old') and reader.do('pread', 1, 3, 16384) == ('ok', b'old')
    assert writers[0].do('pwrite', 1, b'x', 4096 * 20) == ('ok', 1)
    for healed in (True, False):
        assert mapper.do('mapped', 0, 3)[0] == 'ok'
        cluster.network.cut('alpha')
        assert mapper.do('store', 0, b'new')[0] == 'ok'  # written back when the page shall be dropped
        for i, writer in enumerate(writers):
            writer.send('pwrite', 1, b'y', 4096 * (i + 20))  # what is no whole page is locked
        for at in (0, 16384):
            assert other.do('pwrite', 1, b'new', at) == ('ok', 3)
        reader.send('pread', 1, 3, 16384)
        time.sleep(1)
        if healed:
            cluster.network.heal('alpha')
            assert reader.receive() == ('ok', b'new') and reader.do('pread', 1, 3, 0) == ('ok', b'new')
            assert [writer.receive() for writer in writers] == [('ok', 1)] * 2
    beta.kill()
    results = [actor.receive(timeout=10) for actor in (reader, *writers)]
    assert all(result[0] == 'errno' for result in results), results
    mapper.kill()
    mapper.wait_ended()
    cluster.network.heal('alpha')
    beta.start()


def a_mount_with_a_timeout_does_not_wait():
    """Its requests fail when the owner does not answer; what it is told afterwards is as true as before."""
    cluster = Cluster(2, content=lambda store: [content.write(f'{store}/f{i}', b'old') for i in range(8)])
    alpha, beta = cluster
    beta.stop()
    beta.start(options=('--timeout', '1s'))
    cluster.wait_connected()
    one, other = Actor(beta.mountpoint), Actor(alpha.mountpoint)
    assert one.do('open', 1, 'f0', os.O_RDWR)[0] == 'ok' and other.do('open', 1, 'f0', os.O_RDWR)[0] == 'ok'
    for rounds in range(2):
        alpha.signal(signal.SIGSTOP)
        start = time.monotonic()
        assert one.do('pwrite', 1, b'x', 0) == ('errno', 'ETIMEDOUT')
        assert one.do('stat', f'f{4 + rounds}') == ('errno', 'ETIMEDOUT')
        assert 1.5 < time.monotonic() - start < 6
        alpha.signal(signal.SIGCONT)
        sandbox.eventually(lambda: one.do('stat', 'f1')[0] == 'ok', 'the owner is back')
        for i in range(8):
            assert one.do('stat', f'f{i}')[1]['size'] == 3 + rounds
            assert other.do('put', f'f{i}', bytes(4 + rounds))[0] == 'ok'
            assert one.do('stat', f'f{i}')[1]['size'] == 4 + rounds, 'attributes from before a change'
            assert one.do('content', f'f{i}') == ('ok', bytes(4 + rounds))
    # What gives a lock up is told, however long that takes.
    holder = Actor(beta.mountpoint)
    assert holder.do('open', 2, 'f1', os.O_RDWR)[0] == 'ok' and holder.do('flock', 2, fcntl.LOCK_EX)[0] == 'ok'
    assert holder.do('open', 3, 'f2', os.O_RDWR)[0] == 'ok' and holder.do('lock', 3, 'w', 0, 1)[0] == 'ok'
    cluster.network.cut('beta')
    holder.close()
    time.sleep(3)
    cluster.network.heal('beta')
    third = Actor(alpha.mountpoint)
    assert third.do('open', 2, 'f1', os.O_RDWR)[0] == 'ok' and third.do('open', 3, 'f2', os.O_RDWR)[0] == 'ok'
    sandbox.eventually(lambda: third.do('flock', 2, fcntl.LOCK_EX)[0] == 'ok', 'the flock is free')
    sandbox.eventually(lambda: third.do('lock', 3, 'w', 0, 1)[0] == 'ok', 'the POSIX lock is free')
    assert other.do('flock', 1, fcntl.LOCK_EX)[0] == 'ok'
    one.send('flock', 1, fcntl.LOCK_EX, True)
    time.sleep(2.5)  # somebody has the lock: that is no owner that does not answer
    assert other.do('flock', 1, fcntl.LOCK_UN)[0] == 'ok'
    assert one.receive()[0] == 'ok'


def an_ordinary_user_has_it_all(user=sandbox.TESTER):
    disk = sandbox.ext4()
    cluster = Cluster(2, disk=disk, user=user)
    alpha, beta = cluster
    actors = [Actor(site.mountpoint, user) for site in cluster]
    for i, actor in enumerate(actors):
        assert actor.do('mkdir', f'd{i}') == ('ok', None)
        assert actor.do('put', f'd{i}/f', b'mine', 0o640)[0] == 'ok'
        assert actor.do('setxattr', f'd{i}/f', 'user.x', b'1')[0] == 'ok'
        assert actor.do('link', f'd{i}/f', f'd{i}/g')[0] == 'ok'
        assert actor.do('rename', f'd{i}/g', f'd{i}/h')[0] == 'ok'
        assert actor.do('symlink', 'x', f'd{i}/s')[0] == 'ok'
    assert actors[0].do('mkdir', 'readonly')[0] == actors[0].do('put', 'readonly/f', b'x')[0] == 'ok'
    assert actors[0].do('chmod', 'readonly', 0o500)[0] == 'ok'
    assert actors[0].do('put', 'd0/unreadable', b'x')[0] == actors[0].do('chmod', 'd0/unreadable', 0o200)[0] == 'ok'
    refused = alpha.migrate(beta, check=False)
    assert refused['result'] == 'failed' and "'d0/unreadable'" in refused['error'] and 'chmod' in refused['error'], refused
    assert actors[0].do('unlink', 'd0/unreadable')[0] == 'ok'
    for i in range(100):
        assert actors[0].do('put', f'top{i}', b'x')[0] == 'ok'
    assert actors[1].do('open', 1, 'top99', os.O_RDWR)[0] == 'ok' and actors[1].do('open', 2, 'd0/f', os.O_RDWR)[0] == 'ok'
    for i, actor in enumerate(actors):  # as git does
        assert actor.do('open', 3, f'd0/pack{i}', os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444)[0] == 'ok'
        assert actor.do('pwrite', 3, b'a', 0) == ('ok', 1)
    before = [actor.do('lstat', 'd0/f') for actor in actors]
    assert before[0] == before[1] and before[0][1]['uid'] == user, before
    alpha.migrate(beta, '--max-pause', '2s')
    assert actors[1].do('pwrite', 1, b'y', 0) == ('ok', 1), 'an inode is not reached while the root is moved'
    assert actors[1].do('pwrite', 2, b'm', 0) == ('ok', 1)
    for i, actor in enumerate(actors):
        assert actor.do('pwrite', 3, b'b', 1) == ('ok', 1) and actor.do('fstat', 3)[1]['mode'] == '0o444'
        assert actor.do('close', 3)[0] == actor.do('unlink', f'd0/pack{i}')[0] == 'ok'
    for actor in actors:
        assert actor.do('content', 'readonly/f') == ('ok', b'x')
        assert actor.do('lstat', 'readonly')[1]['mode'] == '0o500'
        assert actor.do('content', 'd1/h') == ('ok', b'mine')
        assert actor.do('list', 'd0') == ('ok', [b'f', b'h', b's'])
    assert actors[0].do('put', 'd1/f', b'after')[0] == 'ok'
    assert actors[1].do('content', 'd1/f') == ('ok', b'after')
    cluster.verify(beta, alpha)
    # The same tree after a restart without file handles: inodes are found by their names.
    seen = actors[0].do('list_types', 'd0')
    for actor in actors:
        actor.close()
    beta.restart()
    sandbox.eventually(lambda: alpha.status()['sites'][0]['connected'], 'alpha is connected again')
    assert Actor(alpha.mountpoint, user).do('list_types', 'd0') == seen
    assert alpha.tail(200).count('privilege') <= 2, 'what privileges would add is said more than once'


def a_disk_that_cannot_be_read_is_no_end_of_file():
    """The image below the store ends in the middle of a file that nobody has in memory any more."""
    disk = sandbox.ext4('256M')
    image = f'{sandbox.WORK}/image1'
    cluster = Cluster(2, disk=disk)
    data = os.urandom(1 << 20)
    content.write(f'{cluster[0].mountpoint}/f', data)
    sandbox.run('sync', '-f', cluster[0].store)
    paths = [f'{site.mountpoint}/f' for site in cluster]
    extents = subprocess.run(['filefrag', '-b4096', '-e', f'{cluster[0].store}/f'], capture_output=True, text=True).stdout
    first, last, physical = map(int, re.search(r'^ +0: +(\d+)\.\. *(\d+): +(\d+)\.\.', extents, re.M).groups())
    assert first == 0 and last >= 200, f'the file is in pieces: {extents}'
    size = os.path.getsize(image)
    os.truncate(image, (physical + 131) * 4096)
    try:
        for path in paths:
            for cached in (f'{cluster[0].store}/f', path):
                with open(cached, 'rb') as f:
                    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with open(path, 'rb', buffering=0) as f:
                seen = b''
                try:
                    while piece := f.read(1 << 16):
                        seen += piece
                    raise AssertionError(f'{path} ends after {len(seen)} bytes')
                except OSError as error:
                    assert error.errno == errno.EIO, error
                assert data.startswith(seen)
    finally:
        os.truncate(image, size)


def state_of_a_user_is_where_xdg_says():
    user = sandbox.TESTER
    disk = sandbox.ext4()
    store, state = f'{disk}/store', f'{disk}/state'
    for directory in (store, state):
        os.mkdir(directory)
        os.chown(directory, user, user)
    environment = {'XDG_STATE_HOME': state, 'PATH': os.environ['PATH'], 'HOME': '/nonexistent'}

    def sharefs(*words, check=True):
        return sandbox.run('setpriv', '--reuid', user, '--regid', user, '--clear-groups', os.path.abspath(
            sandbox.os.environ.get('SHAREFS') or f'{sandbox.BUILD}/sharefs'), *words, env=environment, check=check)

    sharefs('init', DATA_SET, '--store', store)
    assert os.listdir(f'{state}/sharefs/{DATA_SET}'), 'no state below XDG_STATE_HOME'
    os.chmod(store, 0)
    assert f'{store} cannot be used as a store: Permission denied' in sharefs('serve', DATA_SET, check=False).stderr


def commands_say_what_is_wrong():
    cluster = Cluster(1)
    alpha = cluster[0]
    os.mkdir(f'{alpha.mountpoint}/inside')
    for words in (('status', 'none'), ('init', DATA_SET, '--store', alpha.store), ('mount', 'none', alpha.mountpoint),
                  ('join', 'nonsense', '--store', f'{sandbox.WORK}/x'), ('abort', DATA_SET),
                  ('migrate', DATA_SET, '--to', 'nobody'), ('init', 'x', '--store', f'{sandbox.WORK}/missing/dir'),
                  ('mount', DATA_SET, f'{sandbox.WORK}/missing'),
                  ('init', 'inside', '--store', f'{alpha.mountpoint}/inside'),
                  ('migrate', DATA_SET, '--to', 'alpha', '--max-pause', 'soon'), ('umount', f'{sandbox.WORK}/nothing')):
        result = alpha.cli(*words, check=False)
        assert result.returncode != 0, f'{words} succeeded: {result.stdout}'
        assert 1 <= len(result.stderr.strip().splitlines()) <= 3, f'{words}: {result.stderr}'
        assert words[0] != 'migrate' or words[3] != 'nobody' or f'"sharefs status {DATA_SET}"' in result.stderr, result
    # A disk that is not mounted, or a directory that has become something else.
    alpha.stop()
    os.rename(alpha.store, f'{alpha.store}.away')
    os.mkdir(alpha.store)
    marker = f'{alpha.store}/.sharefs/data_set'
    for change in (lambda: None, lambda: os.mkdir(f'{alpha.store}/.sharefs'), lambda: content.write(marker, b'12345'),
                   lambda: os.remove(marker), lambda: os.mkfifo(marker)):
        change()
        result = alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False)
        assert result.returncode == 1 and alpha.store in result.stderr, result
        assert len(result.stderr.strip().splitlines()) == 1, result


if __name__ == '__main__':
    sys.exit(sandbox.main({
        'operations_on_the_owner_compare_equal': (operations_on_the_owner_compare_equal, 60),
        'operations_on_the_owner_with_a_second_site_compare_equal':
            (operations_on_the_owner_with_a_second_site_compare_equal, 60),
        'operations_on_another_site_compare_equal': (operations_on_another_site_compare_equal, 60),
        'random_operations_on_the_owner': (random_operations_on_the_owner, 60),
        'random_operations_on_three_sites_1': (functools.partial(random_operations_on_three_sites, 21), 60),
        'random_operations_on_three_sites_2': (functools.partial(random_operations_on_three_sites, 22), 60),
        'every_kind_of_application_on_three_sites': (every_kind_of_application_on_three_sites, 60),
        'what_was_acknowledged_is_seen': (what_was_acknowledged_is_seen, 60),
        'adopting_leaves_the_files_where_they_are': (adopting_leaves_the_files_where_they_are, 30),
        'a_strangers_file_in_an_old_image_is_not_lost': (a_strangers_file_in_an_old_image_is_not_lost, 60),
        'mounted_over_the_store_itself': (mounted_over_the_store_itself, 60),
        'a_handle_is_followed_below_a_store_that_is_mounted_over':
            (a_handle_is_followed_below_a_store_that_is_mounted_over, 30),
        'a_mount_takes_the_place_of_a_dead_one': (a_mount_takes_the_place_of_a_dead_one, 60),
        'a_store_that_was_moved_is_found_by_a_link': (a_store_that_was_moved_is_found_by_a_link, 60),
        'a_dead_mount_is_known_by_more_than_its_attributes': (a_dead_mount_is_known_by_more_than_its_attributes, 60),
        'a_refused_mount_leaves_the_dead_one': (a_refused_mount_leaves_the_dead_one, 60),
        'a_refused_mount_of_a_user_leaves_the_dead_one':
            (functools.partial(a_refused_mount_leaves_the_dead_one, sandbox.TESTER), 60),
        'a_dead_mount_that_cannot_be_set_aside_is_named': (a_dead_mount_that_cannot_be_set_aside_is_named, 60),
        'a_root_that_cannot_act_for_others_is_told_so_before_it_serves':
            (a_root_that_cannot_act_for_others_is_told_so_before_it_serves, 30),
        'a_mount_that_is_interrupted_does_not_come_later': (a_mount_that_is_interrupted_does_not_come_later, 60),
        'setuid_that_a_write_has_ended_is_not_in_effect_any_more':
            (setuid_that_a_write_has_ended_is_not_in_effect_any_more, 60),
        'mount_8_mounts_it': (mount_8_mounts_it, 60),
        'a_mount_waits_for_the_end_of_the_one_before': (a_mount_waits_for_the_end_of_the_one_before, 60),
        'a_mount_point_is_his_who_has_it_now': (a_mount_point_is_his_who_has_it_now, 30),
        'a_daemon_that_hangs_holds_nobody_up': (a_daemon_that_hangs_holds_nobody_up, 90),
        'who_ignores_the_end_of_children_is_told_the_truth': (who_ignores_the_end_of_children_is_told_the_truth, 60),
        'a_store_has_one_daemon': (a_store_has_one_daemon, 60),
        'what_is_stored_in_a_mapping_is_seen_everywhere_after_msync':
            (what_is_stored_in_a_mapping_is_seen_everywhere_after_msync, 60),
        'locks_of_an_open_file_description_end_with_it': (locks_of_an_open_file_description_end_with_it, 60),
        'stores_in_a_mapping_are_data_and_older_than_a_time_that_is_set':
            (stores_in_a_mapping_are_data_and_older_than_a_time_that_is_set, 60),
        'stores_in_a_mapping_are_there_for_who_passes_by_the_pages':
            (stores_in_a_mapping_are_there_for_who_passes_by_the_pages, 60),
        'a_mapping_of_an_append_handle_is_one_as_any_other': (a_mapping_of_an_append_handle_is_one_as_any_other, 60),
        'stores_on_their_way_are_older_than_what_is_done_since': (stores_on_their_way_are_older_than_what_is_done_since, 60),
        'umount_takes_away_nothing_but_the_mount': (umount_takes_away_nothing_but_the_mount, 60),
        'empty_directories_that_were_tidied_away_are_made_again': (empty_directories_that_were_tidied_away_are_made_again, 60),
        'a_busy_mount_says_what_is_mounted_in_it': (a_busy_mount_says_what_is_mounted_in_it, 60),
        'a_restart_keeps_inode_numbers': (a_restart_keeps_inode_numbers, 60),
        'another_site_waits_for_the_owner': (another_site_waits_for_the_owner, 90),
        'a_mount_as_a_service_waits_for_the_owner': (a_mount_as_a_service_waits_for_the_owner, 90),
        'a_slow_link_is_only_slow': (a_slow_link_is_only_slow, 120),
        'who_is_cut_off_is_shown_nothing_old': (who_is_cut_off_is_shown_nothing_old, 60),
        'who_is_told_late_is_waited_for': (who_is_told_late_is_waited_for, 90),
        'who_is_behind_a_slow_link_is_shown_nothing_old': (who_is_behind_a_slow_link_is_shown_nothing_old, 90),
        'a_file_becomes_an_append_only_one_while_it_is_open': (a_file_becomes_an_append_only_one_while_it_is_open, 60),
        'who_cannot_reach_a_new_owner_is_shown_nothing_old': (who_cannot_reach_a_new_owner_is_shown_nothing_old, 60),
        'callers_of_the_only_mount_can_be_killed_while_the_owner_is_away':
            (callers_of_the_only_mount_can_be_killed_while_the_owner_is_away, 60),
        'who_is_cut_off_can_be_killed': (who_is_cut_off_can_be_killed, 90),
        'a_mount_with_a_timeout_does_not_wait': (a_mount_with_a_timeout_does_not_wait, 60),
        'an_ordinary_user_has_it_all': (an_ordinary_user_has_it_all, 60),
        'a_disk_that_cannot_be_read_is_no_end_of_file': (a_disk_that_cannot_be_read_is_no_end_of_file, 60),
        'state_of_a_user_is_where_xdg_says': (state_of_a_user_is_where_xdg_says, 30),
        'commands_say_what_is_wrong': (commands_say_what_is_wrong, 30),
    }))
