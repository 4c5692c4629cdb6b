#!/usr/bin/env python3
"""Faults at random moments, several at once, while ownership moves and applications write: whatever was acknowledged is
there in the end, on every site, and one site owns it. A run's seed is in its name, and as SHAREFS_CHAOS_SEED another."""

import contextlib
import functools
import os
import random
import sqlite3
import sys
import threading
import time
import traceback

import content
import power
import sandbox
from cluster import DATA_SET, Cluster
from loads import Load, once
from locked import Locked
from seen import Seen

SECONDS = int(os.environ.get('SHAREFS_CHAOS_SECONDS', 25))
FAULTS = ('kill', 'kill', 'freeze', 'cut', 'cut one way', 'nothing')
# Those that a mount outlives.
PAUSES = ('freeze', 'cut', 'cut one way', 'nothing')
# A frozen daemon cannot follow the owner's recalls, which waits for it for 5 s.
LONGEST_FREEZE = 2


class Chaos:
    """Applications that write until their mount is gone; afterwards everything is looked for."""

    faults = FAULTS
    longest_freeze = 7

    def __init__(self, seed):
        self.seed = seed
        self.cluster = self.make_cluster()
        self.scratch = f'{sandbox.WORK}/scratch'
        os.makedirs(self.scratch)
        self.over = threading.Event()
        self.failed = []
        self.said = []
        self.loads = []
        self.began = time.monotonic()

    @staticmethod
    def make_cluster():
        return Cluster(3, content=functools.partial(content.small, files=120))

    def say(self, what):
        self.said.append(f'{time.monotonic() - self.began:6.2f} {what}')

    def begin(self):
        for site in self.cluster:
            self.start_loads(site, 0)

    def start_loads(self, site, life):
        name = f'{site.name}{life}'
        for mode, more in (('writer', {'expect': f'{self.scratch}/{name}', 'rate': 200}),
                           ('fsync-writer', {'board': f'{self.scratch}/b{name}', 'rate': 50})):
            self.loads.append(Load(mode, dir=site.mountpoint, id=name, until_gone=True, **more))

    def bring_up(self, site):
        """A mount waits a while for the owner, which may be away itself."""
        deadline = time.monotonic() + 90 * sandbox.PATIENCE
        while True:
            try:
                return site.start()
            except AssertionError:
                site.kill()
                if time.monotonic() > deadline:
                    raise

    def haunt(self, site):
        """All that happens to one site, one thing after the other."""
        r = random.Random(f'{self.seed} {site.name}')
        life = 0
        while not self.over.wait(r.uniform(0.2, 4)):
            fault, length = r.choice(self.faults), r.choice((r.uniform(0, 0.3), r.uniform(0.3, 2), r.uniform(2, 7)))
            self.say(f'{site.name}: {fault} {length:.2f} s')
            if fault in ('kill', 'power cut'):
                if fault == 'kill':
                    site.kill()
                else:
                    power.cut(site)
                time.sleep(length)
                self.bring_up(site)
                life += 1
                self.start_loads(site, life)
            elif fault == 'freeze':
                length = min(length, self.longest_freeze)
                site.signal(sandbox.signal.SIGSTOP)
                time.sleep(length)
                site.signal(sandbox.signal.SIGCONT)
            elif fault.startswith('cut'):
                other = r.choice([s.name for s in self.cluster if s is not site] + [None])
                self.cluster.network.cut(site.name, other, one_way=fault == 'cut one way')
                time.sleep(length)
                self.cluster.network.heal(site.name)
            self.say(f'{site.name}: well again')

    def migrate(self):
        r = random.Random(f'{self.seed} migrate')
        sites = list(self.cluster)
        while not self.over.wait(r.uniform(0, 1.5)):
            asked, to = r.choice(sites), r.choice(sites)
            command = asked.command('migrate', DATA_SET, '--to', to.name, '--json', '--max-pause', r.choice(('1s', '3s')))
            process = sandbox.subprocess.Popen(command, env=asked.environment(), stdout=sandbox.subprocess.PIPE,
                                               stderr=sandbox.subprocess.STDOUT, text=True)
            patience = r.uniform(0, 6)
            try:
                out = process.communicate(timeout=patience)[0]
                self.say(f'migrate to {to.name}: {(out.strip().splitlines() or ["?"])[-1][:300]}')
            except sandbox.subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                said = ''
                if r.random() < 0.5:
                    try:
                        said = r.choice(sites).cli('abort', DATA_SET, check=False, timeout=10).stderr.strip()
                    except sandbox.subprocess.TimeoutExpired:
                        said = 'no answer'
                self.say(f'migrate to {to.name}: not waited for; abort: {said}')

    def run(self, what, *arguments):
        try:
            what(*arguments)
        except BaseException:
            self.failed.append(traceback.format_exc())
            self.over.set()

    def settled(self):
        states = [site.status() for site in self.cluster]
        owners = {state['owner'] for state in states}
        roles = [state['site'] for state in states if state['role'] == 'owner']
        running = [state for state in states if (state.get('handoff') or {}).get('result') == '']
        return len(owners) == 1 and roles == list(owners) and not running

    def wait_settled(self):
        sandbox.eventually(self.settled, 'one owner, and no handoff under way', 90)
        time.sleep(2)  # what was asked of a site that was frozen begins now
        sandbox.eventually(self.settled, 'one owner, and no handoff under way', 90)

    def check(self):
        self.wait_settled()
        results = [load.stop(check=False) for load in self.loads]
        wrong = [f'{r["mode"]} {r.get("id")}: {r["first_error"]}' for r in results if r['errors']]
        assert not wrong, '\n  '.join(['applications saw errors:', *wrong])
        mounts = [site.mountpoint for site in self.cluster]
        for k, load in enumerate(self.loads):
            once('verify-' + load.mode,
                 **(load.values | {'dir': mounts[k % 3], 'rate': None, 'until_gone': None, 'rewrite': None}))
        owner = self.cluster.owner()
        other = next(site for site in self.cluster if site is not owner)
        self.cluster.hand_over_and_compare(other, '--max-pause', '2s')

    def play(self):
        self.begin()
        threads = [threading.Thread(target=self.run, args=(self.haunt, site)) for site in self.cluster]
        threads.append(threading.Thread(target=self.run, args=(self.migrate,)))
        for thread in threads:
            thread.start()
        self.over.wait(SECONDS)
        self.over.set()
        for thread in threads:
            thread.join()
        try:
            assert not self.failed, self.failed[0]
            self.check()
        except BaseException:
            print(f'seed {self.seed}\n' + '\n'.join(self.said), flush=True)
            raise


class SeenThroughPauses(Chaos):
    """Readers and writers on all sites: what was acknowledged is seen, also by who was frozen or cut off."""

    faults = PAUSES
    longest_freeze = LONGEST_FREEZE

    def begin(self):
        self.seen = Seen([site.mountpoint for site in self.cluster])

    def check(self):
        self.wait_settled()
        self.seen.stop()


class PowerCuts(Chaos):
    """Machines that lose their power: what was synced is there in the end."""

    faults = ('power cut', 'power cut', 'kill', 'freeze', 'cut', 'cut one way', 'nothing')

    @staticmethod
    def make_cluster():
        def files(store):
            content.small(store, files=120)
            os.sync()
        return power.cluster(content=files)

    def start_loads(self, site, life):
        name = f'{site.name}{life}'
        self.loads.append(Load('fsync-writer', dir=site.mountpoint, id=name, board=f'{self.scratch}/b{name}', rate=50,
                               until_gone=True, rewrite=True))


class LocksThroughFaults(Chaos):
    """Processes on all sites that lock counters. One fault at a time: a site that is away for longer than a restarted owner
    waits for it loses its locks."""

    processes = 3  # on each site

    def begin(self):
        self.locked = Locked(self.cluster[0].mountpoint, self.scratch)
        for site in self.cluster:
            self.start_loads(site, 0)

    def start_loads(self, site, life):
        for k in range(self.processes):
            self.locked.start(site.mountpoint, f'{self.seed} {site.name} {life} {k}')

    def haunt(self, site):
        if site is not self.cluster[0]:
            while not self.over.wait(0.1):
                self.locked.running_well(site.mountpoint)
            return
        r = random.Random(f'{self.seed} faults')
        life = 0
        while not self.over.wait(r.uniform(0.2, 2)):
            site, length = r.choice(list(self.cluster)), r.uniform(0, 1.5)
            fault = r.choice(('kill', 'kill', 'kill', 'kill', 'freeze', 'cut', 'cut one way'))
            self.say(f'{site.name}: {fault} {length:.2f} s')
            if fault == 'kill':
                site.kill()
                self.locked.ended(site.mountpoint)
                time.sleep(length)
                self.bring_up(site)
                life += 1
                self.start_loads(site, life)
            elif fault == 'freeze':
                site.signal(sandbox.signal.SIGSTOP)
                time.sleep(length)
                site.signal(sandbox.signal.SIGCONT)
            else:
                other = r.choice([s.name for s in self.cluster if s is not site] + [None])
                self.cluster.network.cut(site.name, other, one_way=fault == 'cut one way')
                time.sleep(length)
                self.cluster.network.heal(site.name)
            self.say(f'{site.name}: well again')
            self.locked.running_well(self.cluster[0].mountpoint)
            self.cluster.wait_connected()

    def check(self):
        self.wait_settled()
        self.locked.stop()
        self.locked.check([site.mountpoint for site in self.cluster])
        sandbox.eventually(lambda: not self.orphans(), 'what was closed without a name is gone')

    def orphans(self):
        with contextlib.closing(sqlite3.connect(f'{self.cluster.owner().home}/{DATA_SET}/state.db')) as db:
            return db.execute('SELECT printf("%x", id) FROM inode WHERE orphan').fetchall()


def play(kind, seed):
    kind(seed).play()


if __name__ == '__main__':
    seeds = [1, 2] + ([os.environ['SHAREFS_CHAOS_SEED']] if 'SHAREFS_CHAOS_SEED' in os.environ else [])
    sys.exit(sandbox.main({f'{name}_{seed}': (functools.partial(play, kind, seed), 240) for seed in seeds
                           for name, kind in (('random_faults', Chaos), ('seen_through_pauses', SeenThroughPauses),
                                                ('random_power_cuts', PowerCuts),
                                                ('locks_through_faults', LocksThroughFaults))}))
