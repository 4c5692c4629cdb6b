"""A private world for one system test, and the runner.

A test runs as process 1 of its own process, mount and network namespaces. Whatever it starts, mounts or configures
is in there, so it is gone when the test ends, also when it is killed. Inside, a test still has to leave nothing
behind: processes and mounts that outlive the test's own clean-up are a failure.
"""

import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import traceback

WORK = '/mnt'
SKIP = 77
# Multiplies every time limit, for busy machines.
PATIENCE = float(os.environ.get('SHAREFS_TEST_PATIENCE', '1'))
TESTER = 4242  # an ordinary user with a name
BUILD = os.environ.get('SHAREFS_BUILD') or os.path.abspath(
    os.path.join(os.path.dirname(__file__), '..', '..', 'build', 'release'))


class Skip(Exception):
    """The machine lacks what the test needs; the text says what."""


def run(*command, check=True, timeout=60, **options):
    """Runs a command, with its output captured as text."""
    result = subprocess.run([c if isinstance(c, bytes) else str(c) for c in command], capture_output=True, text=True, timeout=timeout * PATIENCE,
                            **options)
    if check and result.returncode != 0:
        raise AssertionError(f'{" ".join(map(str, command))}: exit {result.returncode}: '
                             f'{result.stderr.strip()} {result.stdout.strip()}')
    return result


def enter():
    """Starts the script again inside the namespaces; returns only there."""
    if os.environ.get('SHAREFS_SANDBOX') == '1':
        return
    if os.geteuid() != 0:
        print('SKIP: needs root (namespaces, loop devices)')
        sys.exit(SKIP)
    os.environ['SHAREFS_SANDBOX'] = '1'
    os.execvp('unshare', ['unshare', '--mount', '--pid', '--net', '--fork', '--kill-child', '--mount-proc',
                          sys.executable, *sys.argv])


def prepare():
    """Own /mnt (a tmpfs), own /run, an ordinary user, a /dev/fuse for everybody."""
    run('mount', '--make-rprivate', '/')
    run('mount', '-t', 'tmpfs', 'tmpfs', '/run')
    run('mount', '-t', 'tmpfs', '-o', 'size=90%', 'tmpfs', WORK)
    os.makedirs('/run/netns')
    # Open to everybody, as udev makes it.
    os.mknod(f'{WORK}/fuse', 0o666 | stat.S_IFCHR, os.makedev(10, 229))
    os.chmod(f'{WORK}/fuse', 0o666)
    run('mount', '--bind', f'{WORK}/fuse', '/dev/fuse')
    with open('/etc/passwd') as users, open(f'{WORK}/passwd', 'w') as more:
        more.write(users.read() + f'tester:x:{TESTER}:{TESTER}::/nonexistent:/bin/sh\n')
    run('mount', '--bind', f'{WORK}/passwd', '/etc/passwd')
    run('ip', 'link', 'set', 'lo', 'up')


_ext4_count = 0


def ext4(size='6G', inodes=None, reserved=0, coarse=False, block=None, image=None):
    """A new ext4 file system in memory; returns its mount point. `reserved`: percent that only root gets. `coarse`:
    its inodes keep whole seconds, and none after 2038. `image`: the file that it is in."""
    global _ext4_count
    _ext4_count += 1
    image = image or f'{WORK}/image{_ext4_count}'
    where = f'{WORK}/disk{_ext4_count}'
    with open(image, 'wb') as f:
        f.truncate(int(size[:-1]) << {'M': 20, 'G': 30}[size[-1]])
    run('mkfs.ext4', '-q', '-F', '-m', reserved, '-E', 'lazy_itable_init=1,lazy_journal_init=1', *(['-N', inodes] if inodes else []),
        *(['-I', 128] if coarse else []), *(['-b', block] if block else []), image)
    os.mkdir(where)
    run('mount', '-o', 'loop,noatime', image, where)
    os.chmod(where, 0o755)
    return where


def ntfs_without_case():
    """A new NTFS in memory that takes names that differ in case for one; returns its mount point."""
    image, where = f'{WORK}/ntfs', f'{WORK}/disk-ntfs'
    with open(image, 'wb') as f:
        f.truncate(64 << 20)
    run('mkntfs', '--force', '--quiet', image)
    os.mkdir(where)
    run('lowntfs-3g', '-o', 'ignore_case,permissions', image, where)
    to_close.append(_Mounted(where))
    return where


class _Mounted:
    def __init__(self, where):
        self._where = where

    def close(self):
        run('umount', self._where)

    def describe(self):
        pass


def tmpfs(options):
    """A new tmpfs, for stores that fill up."""
    global _ext4_count
    _ext4_count += 1
    where = f'{WORK}/tmpfs{_ext4_count}'
    os.mkdir(where)
    run('mount', '-t', 'tmpfs', '-o', options, 'tmpfs', where)
    return where


def drop_caches():
    """What is on the disk is read from there again."""
    os.sync()
    with open('/proc/sys/vm/drop_caches', 'w') as f:
        f.write('3')


def overlay(directory):
    """Changes to the directory are seen in this namespace only."""
    above = tmpfs('mode=755')
    for folder in ('upper', 'work'):
        os.mkdir(f'{above}/{folder}')
    run('mount', '-t', 'overlay', '-o', f'lowerdir={directory},upperdir={above}/upper,workdir={above}/work', 'overlay', directory)


def mounts():
    """The mount points of this namespace."""
    with open('/proc/self/mountinfo', 'rb') as f:
        return [line.split()[4].decode('unicode_escape') for line in f]


def fuse_mounts():
    with open('/proc/self/mountinfo') as f:
        return [line.split()[4].encode().decode('unicode_escape') for line in f if ' fuse' in line.split(' - ')[1][:6]
                or line.split(' - ')[1].startswith('fuse')]


def processes():
    """Processes of this namespace other than this one: {pid: command line}."""
    found = {}
    for name in os.listdir('/proc'):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f'/proc/{name}/cmdline', 'rb') as f:
                command = f.read().replace(b'\0', b' ').decode(errors='replace').strip()
            with open(f'/proc/{name}/stat') as f:
                state = f.read().rsplit(')', 1)[1].split()[0]
            with open(f'/proc/{name}/status') as f:
                kernel_thread = 'VmSize' not in f.read() and state != 'Z'
        except OSError:
            continue
        if not kernel_thread and state != 'Z':
            found[int(name)] = f'{command} [{state}]'
    return found


def reap():
    """Collects orphans that ended: this is process 1 here."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def kernel():
    """The running Linux: (major, minor)."""
    return tuple(map(int, re.match(r'(\d+)\.(\d+)', os.uname().release).groups()))


def eventually(condition, what, timeout=20, every=0.05):
    """Waits until condition() is true; its last value is returned."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f'not within {timeout} s: {what}')
        time.sleep(every)


def leaks(before):
    """What a test left behind: processes and mounts."""
    deadline = time.monotonic() + 5
    while True:
        left = [f'process {pid}: {command}' for pid, command in processes().items()]
        left += [f'mount {where}' for where in fuse_mounts() if where not in before]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


class _Watchdog:
    """Ends a test that hangs, with what can be said about it."""

    def __init__(self, seconds, on_expiry):
        self._ended = threading.Event()
        self._seconds = seconds
        self._on_expiry = on_expiry
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self):
        if self._ended.wait(self._seconds):
            return
        print(f'FAIL: still running after {self._seconds} s', flush=True)
        for frame in sys._current_frames().values():
            traceback.print_stack(frame, file=sys.stdout)
        self._on_expiry()
        sys.stdout.flush()
        os._exit(1)

    def end(self):
        self._ended.set()


# Objects with close() and describe(): what main() cleans up after each test, newest first.
to_close = []


def _describe():
    for thing in reversed(to_close):
        try:
            thing.describe()
        except Exception:  # what is broken must not hide the rest
            traceback.print_exc(file=sys.stdout)


def _run_one(name, test, seconds):
    before = mounts()
    watchdog = _Watchdog(seconds * PATIENCE, _describe)
    start = time.monotonic()
    verdict = 'ok'
    try:
        test()
    except Skip as reason:
        verdict = f'SKIP: {reason}'
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        _describe()
        verdict = 'FAIL'
    while to_close:
        try:
            to_close.pop().close()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            verdict = 'FAIL'
    reap()
    left = leaks(before)
    if left:
        print('left behind:', *left, sep='\n  ')
        for pid in processes():
            os.kill(pid, signal.SIGKILL)
        for where in fuse_mounts():
            subprocess.run(['umount', '-l', where], check=False)
        verdict = 'FAIL'
    watchdog.end()
    print(f'{name}: {verdict} ({time.monotonic() - start:.1f} s)', flush=True)
    return verdict


def main(tests):
    """Runs the tests named on the command line (all by default), each in a sandbox of its own; `--list` prints their names.

    `tests` maps names to (function, seconds that it may take).
    """
    if '--list' in sys.argv:
        print(*(f'{name} {seconds}' for name, (_, seconds) in tests.items()), sep='\n')
        return 0
    wanted = sys.argv[1:] or list(tests)
    if len(wanted) > 1:  # sites of one name, and their addresses, are there once
        codes = {subprocess.call([sys.executable, sys.argv[0], name]) for name in wanted}
        return next(iter(codes)) if codes in ({0}, {SKIP}) else int(bool(codes - {0, SKIP}))
    enter()
    prepare()
    verdict = _run_one(wanted[0], *tests[wanted[0]])
    sys.stdout.flush()
    return 1 if verdict == 'FAIL' else SKIP if verdict.startswith('SKIP') else 0
