#!/usr/bin/env python3
"""The applications of packaging/quickstart: they write through a mount, and check every write afterwards.

    quickstart_writer.py write MOUNT NAME STOP REPORT   work in MOUNT/writers/NAME until the file STOP exists
    quickstart_writer.py check MOUNT REPORT...          compare what a mount shows with what was written
    quickstart_writer.py stall T0 T3 REPORT...          the longest operation that touched [T0, T3] (ns since 1970)
"""
import json
import os
import sys
import time

BLOCK = 4096
BLOCKS = 16
FILES = 40


class Writer:
    """One process that appends, overwrites, creates, renames and removes, and remembers what it must find."""

    def __init__(self, directory):
        os.makedirs(directory, exist_ok=True)
        self.directory = directory
        self.operations = 0
        self.errors = []
        self.slow = []      # (start, end) of each operation of a millisecond and more, ns since 1970
        self.lines = 0      # appended to `log`
        self.blocks = {}    # block number -> what `data` has there
        self.files = {}     # name -> content
        self.log = os.open(f'{directory}/log', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.data = os.open(f'{directory}/data', os.O_RDWR | os.O_CREAT, 0o644)

    def timed(self, operation, *arguments):
        start = time.time_ns()
        try:
            return operation(*arguments)
        except OSError as error:
            self.errors.append(f'{operation.__name__}: {error}')
            return None
        finally:
            end = time.time_ns()
            self.operations += 1
            if end - start >= 1_000_000:
                self.slow.append((start, end))

    def append(self, number):
        if self.timed(os.write, self.log, b'line %d\n' % number) is not None:
            self.lines = number + 1

    def overwrite(self, number):
        block = number % BLOCKS
        content = f'{number} '
        data = (content * (BLOCK // len(content) + 1))[:BLOCK].encode()
        if self.timed(os.pwrite, self.data, data, block * BLOCK) == BLOCK:
            self.blocks[block] = content
        if self.timed(os.pread, self.data, BLOCK, block * BLOCK) != data:
            self.errors.append(f'block {block} reads differently from what was just written ({number})')
        if number % 64 == 0:
            self.timed(os.fsync, self.data)

    def replace(self, number):
        """As editors save: a new file, renamed over the old one."""
        name = f'file{number % FILES}'
        temporary = f'{self.directory}/.new'
        fd = self.timed(os.open, temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        if fd is None:
            return
        content = f'version {number}'
        self.timed(os.write, fd, content.encode())
        self.timed(os.close, fd)
        self.timed(os.rename, temporary, f'{self.directory}/{name}')
        self.files[name] = content
        victim = f'file{(number + FILES // 2) % FILES}'
        if number % 3 == 0 and victim in self.files:
            self.timed(os.unlink, f'{self.directory}/{victim}')
            del self.files[victim]

    def run(self, stop):
        number = 0
        while not os.path.exists(stop):
            self.append(number)
            self.overwrite(number)
            self.replace(number)
            number += 1
            time.sleep(0.005)
        os.close(self.log)
        os.close(self.data)


def write(mount, name, stop, report):
    writer = Writer(f'{mount}/writers/{name}')
    writer.run(stop)
    kept = ('operations', 'errors', 'slow', 'lines', 'blocks', 'files')
    with open(report, 'w') as file:
        json.dump({'name': name} | {key: getattr(writer, key) for key in kept}, file)


def load(reports):
    for path in reports:
        with open(path) as file:
            yield json.load(file)


def differences(mount, report):
    directory = f'{mount}/writers/{report["name"]}'
    with open(f'{directory}/log', 'rb') as file:
        if file.read() != b''.join(b'line %d\n' % n for n in range(report['lines'])):
            yield f'{directory}/log: lines are missing or doubled'
    with open(f'{directory}/data', 'rb') as file:
        data = file.read()
    for block, content in report['blocks'].items():
        start = int(block) * BLOCK
        if data[start:start + BLOCK] != (content * (BLOCK // len(content) + 1))[:BLOCK].encode():
            yield f'{directory}/data: block {block} is not the one that was written last'
    found = {name for name in os.listdir(directory) if name not in ('log', 'data')}
    if found != set(report['files']):
        yield f'{directory}: {sorted(found ^ set(report["files"]))} should or should not be there'
    for name in found & set(report['files']):
        with open(f'{directory}/{name}') as file:
            if file.read() != report['files'][name]:
                yield f'{directory}/{name}: is not the version that was written last'


def check(mount, *reports):
    operations, problems = 0, []
    for report in load(reports):
        operations += report['operations']
        problems += report['errors'] + list(differences(mount, report))
    for problem in problems[:20]:
        print(problem)
    print(f'{operations:,} operations of {len(reports)} writers, every write checked: {len(problems)} errors')
    return 1 if problems or operations == 0 else 0


def stall(t0, t3, *reports):
    t0, t3 = int(t0), int(t3)
    slow = [(end - start) / 1e6 for report in load(reports) for start, end in report['slow'] if end >= t0 and start <= t3]
    longest = max(slow, default=None)
    print('less than 1 ms' if longest is None else f'{longest:.1f} ms')


if __name__ == '__main__':
    sys.exit({'write': write, 'check': check, 'stall': stall}[sys.argv[1]](*sys.argv[2:]))
