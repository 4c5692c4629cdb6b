"""Sites of one data set on this machine, as a test sees them: each with a state folder, a store, a mount, an address."""

import json
import os
import signal
import subprocess
import time

import sandbox
from network import Network
from sandbox import BUILD, eventually, fuse_mounts, run
from tree import SAME_FILE_SYSTEM_SEEN, assert_equal

SHAREFS = os.environ.get('SHAREFS') or f'{BUILD}/sharefs'
PORT = 7100
DATA_SET = 'd'


class Site:
    """One site. `home`, `store` and `mountpoint` are directories; the daemon runs in the foreground as our child."""

    def __init__(self, network, name, store, user=None):
        self.name = name
        self.address = network.add(name)
        self.home = f'{sandbox.WORK}/{name}/home'
        self.store = store
        self.mountpoint = f'{sandbox.WORK}/{name}/mnt'
        self.log = f'{sandbox.WORK}/{name}/log'
        self.user = user
        self.process = None
        self.mounted_at = None
        self._network = network
        for directory in (f'{sandbox.WORK}/{name}', self.home, self.store, self.mountpoint):
            os.makedirs(directory, exist_ok=True)
            if user is not None and directory != self.store:
                os.chown(directory, user, user)

    @property
    def listen(self):
        return f'tcp://{self.address}:{PORT}'

    def command(self, *words, limits=()):
        command = self._network.inside(self.name)
        if self.user is not None:
            command += ['setpriv', '--reuid', str(self.user), '--regid', str(self.user), '--clear-groups']
        if limits:
            command += ['prlimit', *limits]
        return [*command, SHAREFS, *map(str, words)]

    def environment(self, faults=None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith('SHAREFS_')}
        environment['SHAREFS_HOME'] = self.home
        if faults:
            environment['SHAREFS_FAULTS'] = faults
        return environment

    def cli(self, *words, check=True, timeout=60):
        """Runs a command of this site: CompletedProcess with text."""
        result = subprocess.run(self.command(*words), env=self.environment(), capture_output=True, text=True,
                                timeout=timeout * sandbox.PATIENCE)
        if check and result.returncode != 0:
            raise AssertionError(f'{self.name}: sharefs {" ".join(map(str, words))}: exit {result.returncode}: '
                                 f'{result.stderr.strip()} {result.stdout.strip()}')
        return result

    def start(self, faults=None, at=None, serve=False, options=(), limits=()):
        """Mounts (or serves) and waits until the daemon answers."""
        assert self.process is None, f'{self.name} runs already'
        self.mounted_at = None if serve else at or self.mountpoint
        words = ['serve', DATA_SET] if serve else ['mount', DATA_SET, self.mounted_at]
        log = open(self.log, 'a')
        log.write(f'--- {" ".join(words)} faults={faults}\n')
        log.flush()
        self.process = subprocess.Popen(self.command(*words, '-f', *options, limits=limits),
                                        env=self.environment(faults), stdout=log, stderr=log)
        log.close()
        eventually(self._is_up, f'{self.name} answers', timeout=30)
        return self

    def _is_up(self):
        if self.process.poll() is not None:
            raise AssertionError(f'{self.name}: the daemon ended with {self.process.returncode}: {self.tail(5)}')
        if self.mounted_at and self.mounted_at not in fuse_mounts():
            return False
        shown = self.cli('status', DATA_SET, '--json', check=False, timeout=20)
        return shown.returncode == 0 and json.loads(shown.stdout)['running']

    def running(self):
        return self.process is not None and self.process.poll() is None

    def stop(self):
        """Ends the daemon the ordinary way; returns what is said about it."""
        if self.process is None:
            return ''
        said = self.cli('umount', DATA_SET, timeout=30).stderr
        self.process.wait(30)
        assert self.process.returncode == 0, f'{self.name}: the daemon ended with {self.process.returncode}'
        self.process = None
        return said

    def signal(self, number):
        self.process.send_signal(number)

    def wait_killed(self, timeout=30):
        """Waits until a fault point killed the daemon, and clears the dead mount away."""
        try:
            self.process.wait(timeout * sandbox.PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f'{self.name} was not killed: its fault point was not passed') from None
        assert self.process.returncode == -signal.SIGKILL, f'{self.name} ended with {self.process.returncode}'
        self._bury()

    def kill(self):
        """SIGKILL to the daemon; its dead mount is cleared away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            self._bury()

    def _bury(self):
        self.process = None
        if self.mounted_at and self.mounted_at in fuse_mounts():
            run('umount', '-l', self.mounted_at)

    def restart(self, faults=None, **options):
        self.kill()
        return self.start(faults, **options)

    def status(self):
        return json.loads(self.cli('status', DATA_SET, '--json').stdout)

    def migrate(self, to, *options, check=True, timeout=120):
        """Hands over to the site `to`; returns the JSON summary, `exit` added."""
        result = self.cli('migrate', DATA_SET, '--to', to.name, '--json', *options, check=False, timeout=timeout)
        return self._summary(result, check)

    def migrate_in_background(self, to, *options):
        """The same without waiting: finish() of what is returned waits and returns the summary."""
        return Migration(self, subprocess.Popen(
            self.command('migrate', DATA_SET, '--to', to.name, '--json', *options), env=self.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))

    def _summary(self, result, check):
        lines = result.stdout.strip().splitlines()
        try:
            summary = json.loads(lines[-1])
        except (IndexError, json.JSONDecodeError):
            summary = {'result': 'failed', 'error': (result.stderr or result.stdout).strip()}
        summary['exit'] = result.returncode
        summary['stderr'] = result.stderr
        if check and (result.returncode != 0 or summary['result'] != 'done'):
            raise AssertionError(f'migrate failed: {summary}')
        return summary

    def abort(self, check=True):
        return self.cli('abort', DATA_SET, check=check)

    def phase(self):
        return self.status().get('phase')

    def memory_peak(self):
        """Most resident memory of the daemon so far, in MiB."""
        with open(f'/proc/{self.process.pid}/status') as f:
            return int(next(line for line in f if line.startswith('VmHWM')).split()[1]) / 1024

    def bytes_read(self):
        """What the daemon has read so far, of files and else."""
        with open(f'/proc/{self.process.pid}/io') as f:
            return int(next(line for line in f if line.startswith('rchar')).split()[1])

    def tail(self, lines=40):
        try:
            with open(self.log, errors='replace') as f:
                return ''.join(f.readlines()[-lines:])
        except OSError:
            return ''


class Migration:
    def __init__(self, site, process):
        self._site = site
        self.process = process

    def finish(self, check=True, timeout=120):
        try:
            out, err = self.process.communicate(timeout=timeout * sandbox.PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise AssertionError(f'migrate does not end: {out} {err}') from None
        return self._site._summary(subprocess.CompletedProcess((), self.process.returncode, out, err), check)

    def kill(self):
        self.process.kill()
        self.process.communicate()


class Cluster:
    """Several joined sites; the first one adopts its store. `with` is not needed: the runner closes it."""

    NAMES = ('alpha', 'beta', 'gamma', 'delta')

    def __init__(self, sites=2, content=None, stores=None, disk=None, mount=True, user=None, network=Network):
        """`content(directory)` fills the first store before it is adopted; `stores`: a directory for each site."""
        sandbox.to_close.append(self)
        self.network = network()
        self.sites = []
        disk = None if stores else disk or sandbox.ext4()
        for number in range(sites):
            name = self.NAMES[number]
            store = stores[number] if stores else f'{disk}/{name}'
            os.makedirs(store, exist_ok=True)
            if user is not None:
                os.chown(store, user, user)
            self.sites.append(Site(self.network, name, store, user))
        first = self.sites[0]
        if content:
            content(first.store)
        first.cli('init', DATA_SET, '--store', first.store, '--site', first.name, '--listen', first.listen)
        if mount:
            self.start()

    def __iter__(self):
        return iter(self.sites)

    def __getitem__(self, index):
        return self.sites[index]

    def start(self):
        """Mounts the first site, joins and mounts the others."""
        self.sites[0].start()
        for site in self.sites[1:]:
            self.join(site)
            site.start()

    def invite(self):
        return self.sites[0].cli('invite', DATA_SET).stdout.strip().splitlines()[-1].strip()

    def join(self, site, token=None, check=True):
        return site.cli('join', token or self.invite(), '--store', site.store, '--site', site.name, '--listen',
                        site.listen, check=check)

    def owner(self):
        """The one site that says it is the owner; more or fewer are a failure."""
        owners = [site for site in self.sites if site.running() and site.status()['role'] == 'owner']
        assert len(owners) == 1, f'owners: {[site.name for site in owners]}'
        return owners[0]

    def wait_connected(self):
        """Waits until every running site is connected to all other running ones."""
        running = {site.name for site in self.sites if site.running()}
        for site in self.sites:
            if site.running():
                eventually(lambda s=site: {o['site'] for o in s.status()['sites'] if o['connected']} >= running - {s.name},
                           f'{site.name} is connected')

    def wait_agreed(self, owner, timeout=30):
        """Waits until every running site names `owner`."""
        for site in self.sites:
            if site.running():
                eventually(lambda s=site: s.status()['owner'] == owner.name, f'{site.name} knows that {owner.name} owns',
                           timeout)

    def verify(self, a, b):
        """`sharefs verify`: the copies of two sites are equal."""
        result = a.cli('verify', DATA_SET, '--with', b.name, check=False, timeout=300)
        assert result.returncode == 0, f'verify {a.name} with {b.name}: {result.stdout} {result.stderr}'

    def hand_over_and_compare(self, to, *options):
        """To a site that is not the owner: its copy is equal, and every mount shows the same."""
        owner = self.owner()
        owner.migrate(to, *options)
        self.wait_agreed(to)
        self.verify(to, owner)
        for site in self.sites[1:]:
            assert_equal(self.sites[0].mountpoint, site.mountpoint, SAME_FILE_SYSTEM_SEEN)

    def describe(self):
        for site in self.sites:
            print(f'--- log of {site.name}:\n{site.tail()}')

    def close(self):
        problems = []
        for site in self.sites:
            if site.process is not None and site.process.poll() is None:
                try:
                    site.signal(signal.SIGCONT)
                    site.stop()
                    continue
                except Exception as error:  # the others have to be stopped as well
                    problems.append(f'{site.name} does not stop: {error}')
            site.kill()
        self.network.close()
        if problems:
            raise AssertionError('; '.join(problems))


def wait_for(seconds):
    """A stretch of ordinary work for the loads that run."""
    time.sleep(seconds)
