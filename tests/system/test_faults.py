#!/usr/bin/env python3
"""Crashes, cuts and aborts at every fault point of a handoff: each ends as the design's table says, and no application
on a site that lives sees an error."""

import functools
import threading
import os
import sqlite3
import sys
import time

import content
import sandbox
from actor import Actor
from cluster import Cluster, DATA_SET
from fault_points import HANDOFF, KERNEL, KILL_ONLY, MOUNT, NEED_RECORDS, REPOSITORY, REQUEST, ROLL_BACK, SOURCE, in_the_source
from loads import Load, once

# Long enough for a busy test machine; a stall far beyond it means that the gate did not open again by itself.
MAX_PAUSE = ('--max-pause', f'{2000 * sandbox.PATIENCE:.0f}ms')
LONGEST_STALL_MS = 4000


class Scene:
    """Three sites; alpha owns and shall hand over to beta; gamma's applications must not notice anything."""

    def __init__(self):
        self.cluster = Cluster(3, content=functools.partial(content.small, files=120))
        self.alpha, self.beta, self.gamma = self.cluster
        self.scratch = f'{sandbox.WORK}/scratch'
        os.makedirs(self.scratch)
        self.actors = {site.name: Actor(site.mountpoint) for site in [self.gamma]}

    def arm(self, point, action):
        """Restarts the process that passes the point, with the fault; alpha is the owner again afterwards."""
        site = self.alpha if point.side == SOURCE else self.beta
        site.stop()
        site.start(faults=f'{point.name}={action}@1')  # once: later attempts must succeed
        self.cluster.wait_connected()
        return site

    def start_loads(self):
        """Writers on gamma, which lives; on the two others writers that may lose their mount."""
        g = self.gamma.mountpoint
        self.living = [Load('writer', dir=g, id='g', expect=f'{self.scratch}/g', rate=300, sync_every=20),
                       Load('appender', file=f'{g}/appended', id='ga', block=128, rate=300),
                       Load('creator', dir=g, id='gc', rate=300)]
        self.mortal = []
        for site in (self.alpha, self.beta):
            n, m = site.name, site.mountpoint
            self.mortal += [Load('writer', dir=m, id=n, expect=f'{self.scratch}/{n}', rate=200, until_gone=True),
                            Load('fsync-writer', dir=m, id=n, board=f'{self.scratch}/b{n}', rate=100, until_gone=True)]
        time.sleep(0.5)

    def goes_on(self, what, timeout=10):
        """A request of gamma is performed: the data set is being served."""
        name = f'probe-{time.monotonic_ns()}'
        result = self.actors['gamma'].do('put', name, b'x', timeout=timeout)
        assert result[0] == 'ok', f'{what}: {result}'

    def stop_loads(self, max_stall_ms=None):
        results = [load.stop(check=False) for load in self.living + self.mortal]
        wrong = [f'{r["mode"]} {r.get("id")}: {r["first_error"]}' for r in results if r['errors']]
        assert not wrong, '\n  '.join(['applications saw errors:', *wrong])
        g = self.gamma.mountpoint
        once('verify-appender', file=f'{g}/appended', block=128, count=f'ga={results[1]["records"]}')
        once('verify-writer', dir=g, id='g', expect=f'{self.scratch}/g')
        for site in (self.alpha, self.beta):
            once('verify-writer', dir=g, id=site.name, expect=f'{self.scratch}/{site.name}')
            once('verify-fsync-writer', dir=g, id=site.name, board=f'{self.scratch}/b{site.name}')
        if max_stall_ms:
            # fsync may take any time on a busy machine (tests/README.md).
            stall, call = max((ms, call) for r in results[:3] for call, ms in r['longest_ms'].items() if call != 'fsync')
            assert stall < max_stall_ms, f'an application stalled for {stall:.0f} ms in {call}'

    def hand_over_and_compare(self):
        """After all this a handoff still works, and every site shows the same."""
        owner = self.cluster.owner()
        other = self.beta if owner is self.alpha else self.alpha
        self.cluster.hand_over_and_compare(other, *MAX_PAUSE)

    def expected_owner(self, point):
        return self.beta if point.committed else self.alpha


def wait_stopped(site, timeout=40):
    """Waits until a fault point stopped the daemon."""
    def stopped():
        with open(f'/proc/{site.process.pid}/stat') as f:
            return f.read().rsplit(')', 1)[1].split()[0] == 'T'
    sandbox.eventually(stopped, f'{site.name} stops at its fault point', timeout)


def killed_at(point):
    scene = Scene()
    victim = scene.arm(point, 'kill')
    scene.start_loads()
    migration = scene.gamma.migrate_in_background(scene.beta, *MAX_PAUSE)
    victim.wait_killed()
    survivor = scene.beta if victim is scene.alpha else scene.alpha
    if not point.committed and victim is scene.beta:
        scene.goes_on('the source opens its gate when the target is gone')
        assert survivor.status()['owner'] == 'alpha'
    time.sleep(0.5)
    victim.start()
    scene.goes_on('it is served again')
    migration.kill()
    _wait_settled(scene, scene.beta if point.committed else None)
    scene.stop_loads()
    scene.hand_over_and_compare()


def _wait_settled(scene, owner=None):
    """No handoff runs any more, and all sites name one owner: `owner`, or any (the source tries again by itself)."""
    def settled():
        states = [site.status() for site in (scene.alpha, scene.beta, scene.gamma)]
        owners = {state['owner'] for state in states}
        roles = [state['site'] for state in states if state['role'] == 'owner']
        running = [state for state in states if (state.get('handoff') or {}).get('result') == '']
        return len(owners) == 1 and roles == list(owners) and not running and owner in (None, scene.cluster.owner())
    sandbox.eventually(settled, 'one owner, and no handoff under way', 45)


def cut_at(point, one_way=False):
    scene = Scene()
    stopped = scene.arm(point, 'stop')
    scene.start_loads()
    migration = scene.alpha.migrate_in_background(scene.beta, *MAX_PAUSE)
    wait_stopped(stopped)
    scene.cluster.network.cut('beta' if one_way else 'alpha', 'alpha' if one_way else 'beta', one_way)
    time.sleep(0.3)  # a source that was stopped for so long asks again before it commits
    stopped.signal(sandbox.signal.SIGCONT)
    if not point.committed:
        scene.goes_on('the source opens its gate when the target is cut off')
    time.sleep(3)
    if not point.committed:
        assert scene.alpha.status()['owner'] == 'alpha'
        scene.goes_on('the source is still the owner')
    scene.cluster.network.heal('beta' if one_way else 'alpha')
    summary = migration.finish(check=False, timeout=60)
    if point.committed:
        assert summary['result'] == 'done', summary
    elif summary['result'] != 'done':
        assert summary['error'] and '\n' not in summary['error'], summary
    scene.cluster.wait_agreed(scene.beta if summary['result'] == 'done' else scene.alpha)
    scene.goes_on('it is served again')
    scene.stop_loads()
    scene.hand_over_and_compare()


def aborted_at(point):
    scene = Scene()
    stopped = scene.arm(point, 'stop')
    scene.start_loads()
    migration = scene.alpha.migrate_in_background(scene.beta, '--max-pause', '3s')
    wait_stopped(stopped)
    asked = sandbox.subprocess.Popen(scene.alpha.command('abort', DATA_SET), env=scene.alpha.environment(),
                                     stdout=sandbox.subprocess.PIPE, stderr=sandbox.subprocess.STDOUT, text=True)
    time.sleep(0.2)
    stopped.signal(sandbox.signal.SIGCONT)
    said = asked.communicate(timeout=30)[0]
    summary = migration.finish(check=False)
    if summary['result'] == 'done':
        # The stop lasted a moment longer than the abort: only just before the commit point can it come too late.
        assert point.name in ('source.final_sent', 'source.log_applied', 'gate.records-durable', 'source.before_commit'), said
    else:
        assert summary['result'] == 'aborted' and summary['exit'] != 0 and asked.returncode == 0, (summary, said)
        assert scene.cluster.owner() is scene.alpha
    scene.goes_on('it is served on')
    scene.stop_loads(LONGEST_STALL_MS)
    scene.hand_over_and_compare()


def a_commit_that_cannot_be_stored_is_sent_again():
    scene = Scene()
    scene.beta.stop()
    scene.beta.start(faults='target.commit=error@1')
    scene.start_loads()
    assert scene.alpha.migrate(scene.beta, *MAX_PAUSE)['result'] == 'done'
    assert scene.cluster.owner() is scene.beta
    scene.goes_on('it is served by the new owner')
    scene.stop_loads()
    scene.hand_over_and_compare()


def too_late_to_abort():
    scene = Scene()
    point = next(p for p in HANDOFF if p.name == 'source.after_commit')
    scene.arm(point, 'sleep:500')
    migration = scene.alpha.migrate_in_background(scene.beta, *MAX_PAUSE)
    summary = migration.finish()
    assert summary['result'] == 'done'
    refused = scene.alpha.abort(check=False)
    assert refused.returncode != 0 and refused.stderr.strip(), 'nothing is left to abort'


def owner_killed_in_a_request(point):
    """A request of another site whose owner dies before, within or after its effect is performed exactly once."""
    scene = Scene()
    scene.alpha.stop()
    scene.alpha.start(faults=f'{point}=kill@{REQUEST[point]}')
    load = Load('creator', dir=scene.gamma.mountpoint, id='once')
    scene.alpha.wait_killed()
    time.sleep(0.5)
    scene.alpha.start()
    scene.goes_on('it is served again', timeout=20)
    time.sleep(0.5)
    load.stop()
    scene.hand_over_and_compare()


def killed_after_a_roll_back():
    scene = Scene()
    scene.alpha.stop()
    # The second sleep lets the target's confirmation arrive before the source looks at its timer again.
    scene.alpha.start(faults='gate.reopened=kill,source.log_applied=sleep:1500,gate.records-durable=sleep:30')
    scene.cluster.wait_connected()
    scene.start_loads()
    migration = scene.gamma.migrate_in_background(scene.beta, '--max-pause', '200ms')
    scene.alpha.wait_killed()
    migration.kill()
    scene.alpha.start()
    scene.cluster.wait_agreed(scene.alpha)
    scene.stop_loads()
    scene.hand_over_and_compare()


def who_is_let_in_during_a_pause_is_not_hidden_from_a_sole_mount():
    """A mount comes while the gate is closed: the one that had the data set for itself hears of it."""
    cluster = Cluster(3, mount=False, content=lambda store: content.write(f'{store}/f', b'old'))
    alpha, beta, gamma = cluster
    alpha.start(faults='round.source=sleep:2000')
    for site in (beta, gamma):
        cluster.join(site)
    beta.start(serve=True)
    cluster.wait_connected()

    def read():
        with open(f'{alpha.mountpoint}/f', 'rb') as f:
            return f.read()

    assert read() == b'old'
    migration = alpha.migrate_in_background(beta, '--max-pause', '20s')
    sandbox.eventually(lambda: (alpha.status().get('handoff') or {}).get('phase') == 'finishing', 'the gate is closed')
    gamma.start()
    assert migration.finish()['result'] == 'done'
    assert read() == b'old' and read() == b'old' and not os.path.exists(f'{alpha.mountpoint}/new')
    content.write(f'{gamma.mountpoint}/new', b'')
    assert os.path.exists(f'{alpha.mountpoint}/new')
    content.write(f'{gamma.mountpoint}/f', b'new')
    time.sleep(2)
    assert read() == b'new'


def records_are_answered_by_a_later_owner():
    """The new owner performs them, cannot tell the old one so, hands over to a third site and is gone."""
    scene = Scene()
    alpha, beta, gamma = scene.cluster
    beta.restart('target.record.stored=stop@1')
    scene.cluster.wait_connected()
    a = alpha.mountpoint
    loads = [Load('writer', dir=a, id='a', expect=f'{scene.scratch}/a', rate=1000),
             Load('appender', file=f'{a}/appended', id='aa', block=128, rate=1000)]
    time.sleep(0.5)
    migration = alpha.migrate_in_background(beta, *MAX_PAUSE)
    wait_stopped(beta)
    scene.cluster.network.cut('alpha', 'beta')
    beta.signal(sandbox.signal.SIGCONT)
    sandbox.eventually(lambda: beta.status()['role'] == 'owner' and gamma.status()['owner'] == 'beta', 'beta serves')
    beta.migrate(gamma, *MAX_PAUSE)
    beta.kill()
    assert migration.finish(timeout=60)['result'] == 'done'
    time.sleep(1)
    appended = [load.stop() for load in loads][1]['records']
    once('verify-writer', dir=a, id='a', expect=f'{scene.scratch}/a')
    once('verify-appender', file=f'{a}/appended', block=128, count=f'aa={appended}')
    scene.cluster.network.heal('alpha')
    beta.start()
    scene.cluster.wait_agreed(gamma)
    scene.hand_over_and_compare()


def a_prepared_target_hears_that_another_site_owns():
    """Its source has gone on, and it cannot be told so by that one."""
    scene = Scene()
    alpha, beta, gamma = scene.cluster
    alpha.restart('source.before_commit=stop@1')
    scene.cluster.wait_connected()
    migration = alpha.migrate_in_background(beta, *MAX_PAUSE)
    wait_stopped(alpha)
    scene.cluster.network.cut('alpha', 'beta')
    time.sleep(0.3)
    alpha.signal(sandbox.signal.SIGCONT)
    scene.goes_on('the source opens its gate')
    alpha.abort(check=False)
    migration.finish(check=False)
    assert beta.status()['handoff']['phase'] == 'prepared', beta.status()['handoff']
    alpha.migrate(gamma, *MAX_PAUSE)
    sandbox.eventually(lambda: any(h['to'] == 'beta' and h['result'] == 'aborted' for h in beta.status()['history']),
                       'beta knows that it is over')
    scene.cluster.network.heal('alpha')
    scene.cluster.wait_connected()
    scene.hand_over_and_compare()


class BrokenAttempt:
    """An attempt that ends after a file has changed behind what was read of it; the file is not touched again. The next
    attempt must not take the target's copy for a good one."""

    def __init__(self, faults):
        self.cluster = Cluster(2, content=lambda store: content.write(f'{store}/f', os.urandom(8 << 20)))
        self.alpha, self.beta = self.cluster
        self.alpha.restart(faults)
        self.cluster.wait_connected()
        self.actor = Actor(self.alpha.mountpoint)
        assert self.actor.do('open', 1, 'f', os.O_WRONLY)[0] == 'ok'
        self.migration = self.alpha.migrate_in_background(self.beta, '--rate', '4MiB/s', *MAX_PAUSE)

    def write(self, offset):
        assert self.actor.do('pwrite', 1, b'changed', offset) == ('ok', 7)

    def try_again(self):
        self.alpha.wait_killed()
        self.migration.kill()
        self.actor.close()
        self.alpha.start()
        self.cluster.wait_connected()
        self.alpha.migrate(self.beta, *MAX_PAUSE)
        self.cluster.verify(self.beta, self.alpha)


def what_changed_behind_the_image_is_sent_by_the_next_attempt():
    attempt = BrokenAttempt('source.image_complete=kill@1')
    time.sleep(1)
    attempt.write(0)  # has been read; the rest of the file takes another second
    attempt.try_again()


def what_changed_behind_a_round_is_sent_by_the_next_attempt():
    attempt = BrokenAttempt('source.round=kill@1,round.source=sleep:500@1')
    time.sleep(1)
    attempt.write(0)
    sandbox.eventually(lambda: 'round.source fires' in attempt.alpha.tail(), 'the log is cut', every=0.01)
    attempt.write(4 << 20)  # belongs to the next round
    attempt.try_again()


def a_gate_is_opened_in_another_tick_than_the_rest_was_sent_in():
    """Many kernels stamp changes by a clock that ticks: in one tick two changes of a file look like one."""
    cluster = Cluster(2)
    alpha, beta = cluster
    alpha.restart('round.source=error@2')  # the second round is the one behind the gate
    cluster.wait_connected()
    load = Load('paced', dir=alpha.mountpoint, id='p', rate=1000)
    summary = alpha.migrate(beta, *MAX_PAUSE, check=False)
    stall = load.stop()['longest_stall_ms']
    assert 'round.source' in summary['error'] and summary['t1'] != 0, summary
    assert stall >= 18, (stall, summary)


def what_is_given_up_leaves_nothing_behind():
    """Neither a prepared target whose source opened its gate again, nor a source that was killed behind its gate."""
    def left(site):
        with sqlite3.connect(f'file:{site.home}/{DATA_SET}/state.db?mode=ro', uri=True) as database:
            return [database.execute(f'SELECT count(*) FROM {rows}').fetchone()[0]
                    for rows in ("blob WHERE key LIKE 'handoff.%'", 'record')]

    scene = Scene()
    for site, faults in ((scene.alpha, 'source.log_applied=sleep:1500@1'), (scene.beta, 'source.before_commit=kill@1')):
        site.stop()
        site.start(faults=faults)
        scene.cluster.wait_connected()
    scene.living = [Load('creator', dir=scene.gamma.mountpoint, id='gc', rate=300)]
    scene.mortal = []
    assert scene.alpha.migrate(scene.beta, '--max-pause', '1s')['attempts'] == 2
    migration = scene.gamma.migrate_in_background(scene.alpha, *MAX_PAUSE)
    scene.beta.wait_killed()
    scene.beta.start()
    migration.finish(check=False)
    _wait_settled(scene, scene.beta)
    scene.living[0].stop()
    for site in (scene.alpha, scene.beta):
        sandbox.eventually(lambda s=site: left(s) == [0, 0], f'nothing is left at {site.name}')


def both_killed_at(point):
    scene = Scene()
    scene.arm(point, 'stop')
    scene.start_loads()
    migration = scene.gamma.migrate_in_background(scene.beta, *MAX_PAUSE)
    wait_stopped(scene.alpha)
    scene.alpha.kill()
    scene.beta.kill()
    migration.kill()
    starting = threading.Thread(target=scene.beta.start)  # each waits for the other
    starting.start()
    scene.alpha.start()
    starting.join()
    _wait_settled(scene, scene.beta if point.committed else None)
    scene.goes_on('it is served again')
    scene.stop_loads()
    scene.hand_over_and_compare()


def target_frozen_during_the_image():
    scene = Scene()
    scene.start_loads()
    migration = scene.alpha.migrate_in_background(scene.beta, '--rate', '2MiB/s', *MAX_PAUSE)
    time.sleep(0.7)
    scene.beta.signal(sandbox.signal.SIGSTOP)
    time.sleep(4)
    scene.goes_on('a frozen target holds nobody up')
    scene.beta.signal(sandbox.signal.SIGCONT)
    migration.finish(check=False)
    scene.stop_loads()
    scene.hand_over_and_compare()


def every_fault_point_is_tested_and_listed():
    tested = {p.name for p in HANDOFF} | set(REQUEST) | set(ROLL_BACK) | set(KERNEL) | set(MOUNT)
    in_source = in_the_source()
    readme = (REPOSITORY / 'tests' / 'README.md').read_text()
    assert tested == in_source, f'only tested: {tested - in_source}; only in the source: {in_source - tested}'
    assert not [name for name in tested if f'`{name}`' not in readme], 'not in tests/README.md'


def tests():
    found = {'every_fault_point_is_tested_and_listed': (every_fault_point_is_tested_and_listed, 10)}
    for point in HANDOFF:
        name = point.name.replace('.', '_').replace('-', '_')
        found[f'killed_at_{name}'] = functools.partial(killed_at, point), 120
        if point.name in KILL_ONLY:
            continue
        if point.name not in NEED_RECORDS:
            found[f'cut_at_{name}'] = functools.partial(cut_at, point), 120
        if not point.committed and point.name not in NEED_RECORDS:
            found[f'aborted_at_{name}'] = functools.partial(aborted_at, point), 90
        if point.name in ('source.t1', 'source.after_commit'):
            found[f'cut_one_way_at_{name}'] = functools.partial(cut_at, point, True), 120
        if point.name in ('source.log_applied', 'source.after_commit'):
            found[f'both_killed_at_{name}'] = functools.partial(both_killed_at, point), 120
    for point in REQUEST:
        name = point.replace('.', '_').replace('-', '_')
        found[f'owner_killed_at_{name}'] = functools.partial(owner_killed_in_a_request, point), 90
    for test, seconds in ((too_late_to_abort, 60), (a_commit_that_cannot_be_stored_is_sent_again, 90),
                          (killed_after_a_roll_back, 90),
                          (who_is_let_in_during_a_pause_is_not_hidden_from_a_sole_mount, 60),
                          (records_are_answered_by_a_later_owner, 120),
                          (a_prepared_target_hears_that_another_site_owns, 120),
                          (target_frozen_during_the_image, 90),
                          (a_gate_is_opened_in_another_tick_than_the_rest_was_sent_in, 60),
                          (what_is_given_up_leaves_nothing_behind, 90),
                          (what_changed_behind_the_image_is_sent_by_the_next_attempt, 60),
                          (what_changed_behind_a_round_is_sent_by_the_next_attempt, 60)):
        found[test.__name__] = test, seconds
    return found


if __name__ == '__main__':
    sys.exit(sandbox.main(tests()))
