"""What sharefs is measured against: bindfs, passthrough_hp (without writeback cache), sshfs, GlusterFS,
rsync over ssh.

Nothing is installed: fetch() downloads Debian packages (and libfuse's source, for its passthrough_hp) into a cache, and
install() unpacks them inside the benchmark's own namespaces, over private overlays of /usr, /etc and /var.
"""

import glob
import os
import shutil
import subprocess

import sandbox
from sandbox import run

PACKAGES = {
    'ssh': ['openssh-server', 'openssh-sftp-server', 'libwrap0', 'sshfs', 'rsync'],
    'gluster': ['glusterfs-server', 'glusterfs-client', 'glusterfs-common', 'glusterfs-cli', 'libglusterfs0', 'libgfrpc0',
                'libgfapi0', 'libgfxdr0', 'libglusterd0', 'libgfchangelog0', 'liburcu8', 'libaio1', 'libtirpc3'],
    'bindfs': ['bindfs', 'libfuse2'],
}
# In the cache: its name says how it was built.
PASSTHROUGH = 'passthrough_hp-xattr'
# Of the host itself, but not 127.0.0.1, which GlusterFS refuses.
ADDRESS = '10.77.0.254'
SSH_PORT = 2222


def _attempt(what, action):
    try:
        action()
    except Exception as error:
        print(f'note: without {what}: {str(error)[:200]}', flush=True)


def fetch(cache):
    """Before the sandbox, with the network: fills the cache. What cannot be had is left out of the comparison."""
    os.makedirs(cache, exist_ok=True)
    for rival, packages in PACKAGES.items():
        folder = f'{cache}/{rival}'
        if not os.path.isdir(folder):
            os.makedirs(f'{folder}.part', exist_ok=True)

            def download(folder=folder, packages=packages):
                run('apt-get', '-q', 'download', *packages, cwd=f'{folder}.part', timeout=300)
                os.rename(f'{folder}.part', folder)
            _attempt(rival, download)
    if not os.path.exists(f'{cache}/{PASSTHROUGH}'):
        _attempt('passthrough_hp', lambda: _build_passthrough(cache))


def _build_passthrough(cache):
    """libfuse's example, as passthrough as it gets, from the source package of the distribution's libfuse."""
    work = f'{cache}/source'
    for folder in ('lists/partial', 'archives/partial'):
        os.makedirs(f'{work}/{folder}', exist_ok=True)
    with open(f'{work}/debian.sources', 'w') as f:
        f.write('Types: deb-src\nURIs: http://deb.debian.org/debian\nSuites: bookworm\nComponents: main\n'
                'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n')
    options = ['-o', f'Dir::Etc::SourceList={work}/debian.sources', '-o', 'Dir::Etc::SourceParts=/dev/null', '-o',
               f'Dir::State::Lists={work}/lists', '-o', f'Dir::Cache={work}']
    run('apt-get', '-q', *options, 'update', timeout=300)
    run('apt-get', '-q', *options, 'source', '--download-only', 'fuse3', cwd=work, timeout=300)
    run('tar', 'xf', glob.glob(f'{work}/fuse3_*.orig.tar.*z')[0], '-C', work)
    example = glob.glob(f'{work}/fuse-*/example')[0]
    flags = run('pkg-config', '--cflags', '--libs', 'fuse3').stdout.split()
    with open(f'{example}/passthrough_hp.cc') as f:
        code = f.read()
    # Several machines cannot share what one kernel keeps back from its file system: compare without writeback cache.
    code = code.replace('if (fs.timeout && conn->capable & FUSE_CAP_WRITEBACK_CACHE)', 'if (false)')
    assert 'if (false)' in code, 'another passthrough_hp than expected'
    with open(f'{example}/passthrough_hp.cc', 'w') as f:
        f.write(code)
    # What libfuse's own build finds on Debian. Without extended attributes it would be another file system: the kernel asks
    # one that has them for security.capability before the first write to a file, and one that has none only once.
    found = [f'-DHAVE_{what}' for what in ('UTIMENSAT', 'POSIX_FALLOCATE', 'SETXATTR')]
    run('g++', '-O2', '-std=c++17', '-D_FILE_OFFSET_BITS=64', *found, f'-I{example}/../include', 'passthrough_hp.cc', '-o',
        f'{cache}/{PASSTHROUGH}', *flags, '-pthread', cwd=example, timeout=300)
    run('rm', '-rf', work)


def install(cache):
    """Inside the sandbox: unpacks the cache over overlays that vanish with it."""
    for folder in ('usr', 'etc', 'var'):
        upper, work = f'{sandbox.WORK}/overlay/{folder}/upper', f'{sandbox.WORK}/overlay/{folder}/work'
        os.makedirs(upper)
        os.makedirs(work)
        run('mount', '-t', 'overlay', 'overlay', '-o', f'lowerdir=/{folder},upperdir={upper},workdir={work}', f'/{folder}')
    for package in glob.glob(f'{cache}/*/*.deb'):
        subprocess.run(f'dpkg-deb --fsys-tarfile {package} | tar -x --keep-directory-symlink -C /', shell=True, check=True)
    run('ldconfig')


class Mounted:
    """A file system served by a process of ours."""

    def __init__(self, label, command, where):
        os.makedirs(where, exist_ok=True)
        self.label, self.where = label, where
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        sandbox.to_close.append(self)
        sandbox.eventually(lambda: where in sandbox.fuse_mounts(), f'{label} is mounted')

    def describe(self):
        pass

    def close(self):
        subprocess.run(['umount', '-l', self.where], check=False)
        self.process.terminate()
        self.process.wait(20)


def bindfs(source, where):
    return Mounted('bindfs', ['bindfs', '-f', source, where], where)


def passthrough(cache, source, where):
    return Mounted('passthrough_hp', [f'{cache}/{PASSTHROUGH}', '--foreground', source, where], where)


class Ssh:
    """An sshd of our own."""

    def __init__(self):
        self.folder = f'{sandbox.WORK}/ssh'
        os.makedirs(self.folder, mode=0o700)
        os.makedirs('/run/sshd')
        with open('/etc/passwd', 'a+') as f:
            f.seek(0)
            if '\nsshd:' not in f.read():
                f.write('sshd:x:104:65534::/run/sshd:/usr/sbin/nologin\n')
        for key in ('host', 'user'):
            run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-f', f'{self.folder}/{key}')
        self.process = subprocess.Popen(
            ['/usr/sbin/sshd', '-D', '-f', '/dev/null', '-h', f'{self.folder}/host', '-p', str(SSH_PORT), '-o',
             f'AuthorizedKeysFile={self.folder}/user.pub', '-o', 'StrictModes=no', '-o', 'PermitRootLogin=yes', '-o',
             'UsePAM=no', '-o', 'Subsystem=sftp internal-sftp'], stderr=subprocess.DEVNULL)
        sandbox.to_close.append(self)
        self.options = ['-p', str(SSH_PORT), '-o', f'IdentityFile={self.folder}/user', '-o', 'StrictHostKeyChecking=no',
                        '-o', 'UserKnownHostsFile=/dev/null', '-o', 'LogLevel=ERROR']
        sandbox.eventually(lambda: run('ssh', *self.options, f'root@{ADDRESS}', 'true', check=False).returncode == 0,
                           'sshd answers')

    def sshfs(self, source, where, strict=False):
        """`strict`: as sharefs, it acknowledges what the server has, and shows what is there now."""
        more = ['-o', 'sshfs_sync,dir_cache=no,entry_timeout=0,attr_timeout=0,direct_io'] if strict else []
        return Mounted('sshfs', ['sshfs', '-f', *self.options, *more, f'root@{ADDRESS}:{source}', where], where)

    def describe(self):
        pass

    def close(self):
        self.process.kill()
        self.process.wait(20)


class Gluster:
    """glusterd, and volumes of one brick each, mounted."""

    # What makes a volume as strict as sharefs: encrypted; acknowledges what the brick has; shows what is there now.
    STRICT = {'client.ssl': 'on', 'server.ssl': 'on', 'auth.ssl-allow': '*', 'performance.write-behind': 'off',
              'performance.flush-behind': 'off', 'performance.stat-prefetch': 'off', 'performance.quick-read': 'off',
              'performance.io-cache': 'off'}

    def __init__(self):
        self.mounts = []
        for folder in ('/var/lib/glusterd', '/var/log/glusterfs', '/run/gluster', '/usr/lib/ssl'):
            os.makedirs(folder, exist_ok=True)
        run('openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=bench', '-keyout',
            '/usr/lib/ssl/glusterfs.key', '-out', '/usr/lib/ssl/glusterfs.pem')
        shutil.copy('/usr/lib/ssl/glusterfs.pem', '/usr/lib/ssl/glusterfs.ca')
        sandbox.to_close.append(self)
        self.process = subprocess.Popen(['glusterd', '-N'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def volume(self, name, brick, where, strict=False):
        for folder in (brick, where):
            os.makedirs(folder, exist_ok=True)
        command = ['gluster', '--mode=script', 'volume']
        sandbox.eventually(lambda: run(*command, 'create', name, f'{ADDRESS}:{brick}', 'force', check=False,
                                       timeout=30).returncode == 0, 'glusterd makes a volume', 30, 0.5)
        for option, value in self.STRICT.items() if strict else ():
            run(*command, 'set', name, option, value)
        run(*command, 'start', name)
        run('mount', '-t', 'glusterfs', *(['-o', 'attribute-timeout=0,entry-timeout=0'] if strict else []),
            f'{ADDRESS}:/{name}', where)
        self.mounts.append(where)
        return where

    def describe(self):
        pass

    def close(self):
        for where in self.mounts:
            subprocess.run(['umount', '-l', where], check=False)
        self.process.kill()
        self.process.wait(20)
        for pid, command in sandbox.processes().items():  # its bricks and helpers; nothing else runs in here
            if command.startswith(('/usr/sbin/gluster', 'gluster', '/usr/libexec/gluster')):
                os.kill(pid, 9)
