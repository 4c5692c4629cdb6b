#!/usr/bin/env python3
"""Machines lose their power at work and in a handoff: what was synced is there, and one site owns it."""

import errno
import functools
import os
import sys
import time

import content
import power
import sandbox
from actor import Actor
from fault_points import HANDOFF, NEED_RECORDS, SOURCE
from loads import Load, once

MAX_PAUSE = ('--max-pause', '2s')
# Where something has just been made durable, or is about to be.
POINTS = ('source.t0', 'source.t1', 'source.log_applied', 'gate.records-durable', 'source.before_commit',
          'source.after_commit', 'source.records_sent', 'image.target.end', 'final.target', 'target.before_prepared',
          'target.prepared', 'target.commit', 'target.owner', 'target.record.stored', 'target.performed',
          'target.taken_over')


class Scene:
    """Three sites; applications that sync on all of them; gamma's machine keeps its power."""

    def __init__(self):
        self.cluster = power.cluster(content=self.files)
        self.alpha, self.beta, self.gamma = self.cluster
        self.scratch = f'{sandbox.WORK}/scratch'
        os.makedirs(self.scratch, exist_ok=True)
        self.loads = []

    @staticmethod
    def files(store):
        """They are older than the data set, and on their disk."""
        content.small(store, files=60)
        os.sync()

    def start_loads(self, *sites):
        for site in sites or self.cluster:
            name = f'{site.name}{len(self.loads)}'
            self.loads.append(Load('fsync-writer', dir=site.mountpoint, id=name, board=f'{self.scratch}/{name}', rate=100,
                                   until_gone=True, rewrite=True))
        time.sleep(0.5)

    def settle(self):
        def settled():
            states = [site.status() for site in self.cluster]
            owners = {state['owner'] for state in states}
            running = [state for state in states if (state.get('handoff') or {}).get('result') == '']
            return len(owners) == 1 and not running and {self.cluster.owner().name} == owners
        sandbox.eventually(settled, 'one owner, and no handoff under way', 45)
        return self.cluster.owner()

    def check(self):
        owner = self.settle()
        wrong = [f'{load.values["id"]}: {result["first_error"]}' for load in self.loads
                 for result in [load.stop(check=False)] if result['errors']]
        assert not wrong, '\n  '.join(['applications saw errors:', *wrong])
        for number, load in enumerate(self.loads):
            once('verify-fsync-writer', dir=self.cluster[number % 3].mountpoint, id=load.values['id'],
                 board=load.values['board'])
        self.cluster.hand_over_and_compare(self.beta if owner is self.alpha else self.alpha, *MAX_PAUSE)


def owner_without_power():
    scene = Scene()
    scene.start_loads()
    for _ in range(4):
        time.sleep(0.7)
        power.cut(scene.alpha)
        time.sleep(0.3)
        scene.alpha.start()
        scene.start_loads(scene.alpha)
    scene.check()


def without_power_at(point):
    scene = Scene()
    victim = scene.alpha if point.side == SOURCE else scene.beta
    victim.stop()
    victim.start(faults=f'{point.name}=kill@1')
    scene.cluster.wait_connected()
    scene.start_loads()
    if point.name in NEED_RECORDS:
        scene.loads.append(Load('creator', dir=scene.gamma.mountpoint, id='c', rate=500))
    migration = scene.gamma.migrate_in_background(scene.beta, *MAX_PAUSE)
    victim.process.wait(40)
    power.cut(victim)
    time.sleep(0.3)
    victim.start()
    migration.kill()
    if point.name in NEED_RECORDS:
        scene.loads.pop().stop(check=False)
    owner = scene.settle()
    assert owner is scene.beta or not point.committed, f'{owner.name} owns'
    scene.check()


def what_is_open_without_a_name_outlives_its_new_owner():
    """It is kept by the new owner, whose state says so, when the power is gone before the store's disk has written it."""
    cluster = power.cluster(3, state_apart=True, content=lambda store: (content.write(f'{store}/f', b'old'), os.sync()))
    alpha, beta, gamma = cluster
    app = Actor(gamma.mountpoint)
    assert app.do('open', 1, 'f', os.O_RDWR)[0] == 'ok'
    assert app.do('unlink', 'f') == ('ok', None)
    assert app.do('pwrite', 1, b'new', 0) == ('ok', 3)
    assert app.do('fsync', 1) == ('ok', None)
    beta.stop()
    beta.start(faults='target.taken_over=kill@1')
    cluster.wait_connected()
    migration = gamma.migrate_in_background(beta, *MAX_PAUSE)
    beta.process.wait(40)
    power.cut(beta)
    beta.start()
    migration.kill()
    cluster.wait_connected()
    assert cluster.owner() is beta
    read = app.do('pread', 1, 3, 0, timeout=30)
    assert read == ('ok', b'new'), read


def overwrite(site, byte, below='below/'):
    """In place, so that size and number of blocks stay; nobody syncs it."""
    for number in range(8):
        with open(f'{site.mountpoint}/{below}big{number}', 'r+b') as f:
            f.write(byte * 300_000)


def big_files(store, below='below/'):
    Scene.files(store)
    os.makedirs(f'{store}/{below}', exist_ok=True)
    for number in range(8):
        content.write(f'{store}/{below}big{number}', b'0' * 300_000)
    os.sync()


def what_an_old_image_has_lost_is_sent_again():
    """A former owner whose disk has the times of what was written last, but not the bytes."""
    cluster = power.cluster(2, content=big_files)
    alpha, beta = cluster
    overwrite(alpha, b'1')
    alpha.migrate(beta, *MAX_PAUSE)
    power.cut(alpha)
    alpha.start()
    cluster.wait_connected()
    beta.migrate(alpha, *MAX_PAUSE)
    cluster.verify(alpha, beta)


def what_an_old_image_has_lost_in_its_root_is_sent_again():
    """As above, but the files are moved out of the store only after the loss."""
    cluster = power.cluster(2, content=functools.partial(big_files, below=''))
    alpha, beta = cluster
    alpha.stop()
    alpha.start(faults='source.after_commit=kill@1')
    cluster.wait_connected()
    overwrite(alpha, b'1', below='')
    migration = beta.migrate_in_background(beta, *MAX_PAUSE)
    alpha.process.wait(40)
    power.cut(alpha, lost={f'{alpha.store}/big{number}': b'0' * 300_000 for number in range(8)})
    alpha.start()
    migration.kill()
    cluster.wait_connected()
    sandbox.eventually(lambda: cluster.owner() is beta, 'beta owns')
    beta.migrate(alpha, *MAX_PAUSE)
    cluster.verify(alpha, beta)


def begin_in_vain(cluster, owner, target, changes=lambda: None):
    """The owner is killed when the target has received all, and nothing is committed. `changes`: what is done before, which
    this process of the owner does not sync."""
    owner.stop()
    owner.start(faults='source.log_applied=kill@1')
    cluster.wait_connected()
    changes()
    migration = owner.migrate_in_background(target, *MAX_PAUSE)
    owner.process.wait(40)
    migration.kill()


def what_was_received_since_a_loss_is_not_compared_again():
    """However often an attempt ends early, the image gets ahead."""
    def read_by(site):
        with open(f'/proc/{site.process.pid}/io') as f:
            return int(next(line for line in f if line.startswith('rchar:')).split()[1])

    cluster = power.cluster(2, content=big_files)
    alpha, beta = cluster
    begin_in_vain(cluster, alpha, beta)
    power.cut(beta)
    alpha.restart()
    beta.start()
    cluster.wait_connected()
    read = [read_by(beta)]
    begin_in_vain(cluster, alpha, beta)
    alpha.restart()
    cluster.wait_connected()
    read.append(read_by(beta))
    alpha.migrate(beta, *MAX_PAUSE)
    read.append(read_by(beta))
    assert read[1] - read[0] >= 8 * 300_000, f'they are not doubted: {read}'
    assert read[2] - read[1] < 4 * 300_000, read
    cluster.verify(beta, alpha)


def lose_what_was_received(cluster, owner, target):
    """The owner's machine loses its power when the target has received all, and nothing is committed."""
    begin_in_vain(cluster, owner, target, lambda: overwrite(owner, b'1'))  # a daemon that ends has synced
    power.cut(owner, lost={f'{owner.store}/below/big{number}': b'0' * 300_000 for number in range(8)})
    owner.start()
    cluster.wait_connected()


def what_an_owner_has_lost_is_not_kept_by_its_target():
    """A target received what was written last; then the owner lost the bytes, but not the times, with its power."""
    cluster = power.cluster(2, content=big_files)
    alpha, beta = cluster
    lose_what_was_received(cluster, alpha, beta)
    alpha.migrate(beta, *MAX_PAUSE)
    cluster.verify(beta, alpha)
    beta.migrate(alpha, *MAX_PAUSE)
    assert alpha.migrate(beta, *MAX_PAUSE)['image_bytes_sent'] == 0
    cluster.verify(beta, alpha)


def what_an_owner_has_lost_is_not_kept_by_a_target_of_its_successor():
    """As above, but the site that received it last is handed the data set by a third one, which has lost nothing."""
    cluster = power.cluster(3, content=big_files)
    alpha, beta, gamma = cluster
    lose_what_was_received(cluster, alpha, beta)
    alpha.migrate(gamma, *MAX_PAUSE)
    gamma.migrate(beta, *MAX_PAUSE)
    cluster.verify(beta, gamma)


def a_loss_is_told_though_another_site_owns_by_then():
    """Alpha loses what gamma has not synced, and hands over to beta before gamma hears of either."""
    cluster = power.cluster(3, content=lambda store: (content.write(f'{store}/f', b'old'), os.sync()))
    alpha, beta, gamma = cluster
    app = Actor(gamma.mountpoint)
    assert app.do('open', 1, 'f', os.O_RDWR)[0] == 'ok'
    assert app.do('fsync', 1) == ('ok', None)  # alpha knows it under its id
    assert app.do('pwrite', 1, b'new', 0) == ('ok', 3)
    cluster.network.cut('gamma')
    power.cut(alpha)
    alpha.start()
    sandbox.eventually(lambda: any(s['site'] == 'beta' and s['connected'] for s in alpha.status()['sites']), 'connected')
    alpha.migrate(beta, *MAX_PAUSE)
    cluster.network.heal('gamma')
    cluster.wait_connected()
    told = app.do('fsync', 1, timeout=30)
    assert told == ('errno', 'EIO'), told
    assert app.do('pwrite', 1, b'new', 0) == ('ok', 3)
    assert app.do('fsync', 1) == ('ok', None)


def a_loss_is_told_after_taking_over():
    """A site that had not synced becomes the owner itself before its application asks."""
    cluster = power.cluster(2)
    alpha, beta = cluster
    with open(f'{beta.mountpoint}/file', 'wb', buffering=0) as file:
        os.fsync(file)
        file.write(b'not synced')
        power.cut(alpha)
        alpha.start()
        cluster.wait_connected()
        alpha.migrate(beta, *MAX_PAUSE)
        try:
            os.fsync(file)
        except OSError as error:
            assert error.errno == errno.EIO, error
        else:
            raise AssertionError(f'fsync succeeds, but the file has {os.fstat(file.fileno()).st_size} bytes')
        os.pwrite(file.fileno(), b'once more', 0)
        os.fsync(file)


if __name__ == '__main__':
    tests = {'owner_without_power': (owner_without_power, 120),
             'what_is_open_without_a_name_outlives_its_new_owner':
                 (what_is_open_without_a_name_outlives_its_new_owner, 60),
             'what_an_old_image_has_lost_is_sent_again': (what_an_old_image_has_lost_is_sent_again, 60),
             'what_an_old_image_has_lost_in_its_root_is_sent_again':
                 (what_an_old_image_has_lost_in_its_root_is_sent_again, 60),
             'what_was_received_since_a_loss_is_not_compared_again':
                 (what_was_received_since_a_loss_is_not_compared_again, 60),
             'what_an_owner_has_lost_is_not_kept_by_its_target': (what_an_owner_has_lost_is_not_kept_by_its_target, 60),
             'what_an_owner_has_lost_is_not_kept_by_a_target_of_its_successor':
                 (what_an_owner_has_lost_is_not_kept_by_a_target_of_its_successor, 60),
             'a_loss_is_told_though_another_site_owns_by_then': (a_loss_is_told_though_another_site_owns_by_then, 60),
             'a_loss_is_told_after_taking_over': (a_loss_is_told_after_taking_over, 60)}
    for point in HANDOFF:
        if point.name in POINTS:
            name = point.name.replace('.', '_').replace('-', '_')
            tests[f'without_power_at_{name}'] = functools.partial(without_power_at, point), 120
    sys.exit(sandbox.main(tests))
