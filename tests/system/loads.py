"""Applications that run while a test does something: tests/tools/workload, started and stopped."""

import json
import os
import signal
import subprocess

import sandbox
from sandbox import BUILD

WORKLOAD = os.environ.get('SHAREFS_WORKLOAD') or f'{BUILD}/tests/tools/workload'


def options(**values):
    words = []
    for key, value in values.items():
        name = '--' + key.replace('_', '-')
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [name] if one is True else [] if one is False or one is None else [name, str(one)]
    return words


def once(mode, check=True, timeout=120, **values):
    """Runs a mode that ends by itself (a verifier, or with seconds=...)."""
    return Load(mode, **values).wait(check, timeout)


class Load:
    """A running mode of the workload tool."""

    def __init__(self, mode, **values):
        self.mode = mode
        self.values = values
        self.result = None
        self.process = subprocess.Popen([WORKLOAD, mode, *options(**values)], stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        sandbox.to_close.append(self)

    def stop(self, check=True, timeout=60):
        """Tells it to stop; it verifies itself and reports. Failures raise."""
        if self.result is None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(check, timeout)

    def wait(self, check=True, timeout=60):
        if self.result is None:
            try:
                out, err = self.process.communicate(timeout=timeout * sandbox.PATIENCE)
            except subprocess.TimeoutExpired:
                raise AssertionError(f'{self.mode} {self.values} hangs') from None
            try:
                self.result = json.loads(out.strip().splitlines()[-1])
            except (IndexError, json.JSONDecodeError):
                self.result = {'errors': 1, 'first_error': f'exit {self.process.returncode}: {err.strip()}', 'ops': 0,
                               'longest_stall_ms': 0}
        if check and self.result['errors']:
            raise AssertionError(f'{self.mode} {self.values}: {self.result["errors"]} errors, the first: '
                                 f'{self.result["first_error"]}')
        return self.result

    def describe(self):
        pass

    def close(self):
        self.process.kill()
        try:
            self.process.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            pass  # it ends with the mount that it waits for, which is closed later


class Everything:
    """Every kind of application at once, spread over the mounts of several sites."""

    def __init__(self, mounts, rate=150):
        self.mounts = list(mounts)
        self.scratch = f'{sandbox.WORK}/loads'
        os.makedirs(self.scratch, exist_ok=True)
        m = self._mount
        self.loads = []
        for i in range(len(self.mounts)):
            self._start('writer', dir=m(i), id=f'w{i}', expect=f'{self.scratch}/w{i}', rate=rate, seed=i + 1,
                        sync_every=50)
            self._start('appender', file=m(i) + '/appended', id=f'a{i}', block=128, rate=rate)
            self._start('creator', dir=m(i), id=f'c{i}', rate=rate, seed=i + 1)
            self._start('lock-counter', file=m(i) + '/locked', id=f'l{i}', rate=20)
            self._start('stat-holder', dir=m(i), id=f'h{i}', files=8)
        once('prepare-renamer', dir=m(0), files=40)
        for i in range(len(self.mounts)):
            self._start('renamer', dir=m(i), files=40, rate=rate, seed=i + 1)
        self._start('directory-stream', dir=[m(0), m(1)], id='s')
        self._start('open-unlinked', dir=m(1), id='u', rate=rate)
        self._start('open-unlinked', dir=m(0), id='v', rate=rate)
        self._start('removed-directory', dir=m(1), id='r')
        self._start('counter', file=m(0) + '/counted', board=self._board('counter'), rate=rate)
        sandbox.eventually(lambda: os.path.exists(m(1) + '/counted') and os.path.getsize(m(1) + '/counted') >= 16384,
                           'the counter started')
        self._start('mmap-reader', file=m(1) + '/counted', board=self._board('counter'), rate=rate)
        self.holders = []
        for posix in (False, True):
            name = f'held-{posix}'
            self.holders.append(self._start('lock-holder', file=m(0) + '/' + name, board=self._board(name), posix=posix))
            sandbox.eventually(lambda n=name: os.path.exists(m(1) + '/' + n), 'the holder started')
            self._start('lock-waiter', file=m(1) + '/' + name, board=self._board(name), posix=posix)

    def _mount(self, number):
        return self.mounts[number % len(self.mounts)]

    def _board(self, name):
        return f'{self.scratch}/board-{name}'

    def _start(self, mode, **values):
        load = Load(mode, **values)
        self.loads.append(load)
        return load

    def check_running(self):
        for load in self.loads:
            if load.process.poll() is not None:
                load.wait()
                raise AssertionError(f'{load.mode} {load.values} ended early: {load.result}')

    def stop(self):
        """Stops all and verifies what they left, from another mount. Returns the longest stall of each kind of call, in
        ms, but for the waiting for locks."""
        self.check_running()
        for load in self.loads:
            if load.mode != 'lock-waiter':
                load.process.send_signal(signal.SIGTERM)
        results = {}
        for load in self.loads:
            results.setdefault(load.mode, []).append(load.wait(check=False))
        wrong = [f'{r["mode"]} {r.get("id")}: {r["errors"]} errors, the first: {r["first_error"]}'
                 for group in results.values() for r in group if r['errors']]
        assert not wrong, '\n  '.join(['applications saw errors:', *wrong])
        for i in range(len(self.mounts)):
            once('verify-writer', dir=self._mount(i + 1), id=f'w{i}', expect=f'{self.scratch}/w{i}')
        counts = [f'{r["id"]}={r["records"]}' for r in results['appender']]
        for i in range(len(self.mounts)):
            once('verify-appender', file=self._mount(i) + '/appended', block=128, count=counts)
            once('verify-renamer', dir=self._mount(i), files=40)
            with open(self._mount(i) + '/locked', 'rb') as f:
                number = int.from_bytes(f.read(8), 'little')
            added = sum(r['added'] for r in results['lock-counter'])
            assert number == added, f'{added} increments under a lock gave {number}'
        stalls = {}
        for name, group in results.items():
            for call, ms in ((c, ms) for r in group if name != 'lock-waiter' for c, ms in r['longest_ms'].items()):
                stalls[call] = max(ms, stalls.get(call, 0))
        return stalls
