#!/usr/bin/env python3
"""The test tools themselves, on a plain directory: they must find nothing wrong there, and find what is made wrong."""

import os
import sys

import sandbox
from loads import Everything, Load, once
from model import random_test
from ops_compare import compare
from tree import assert_equal, digest, differences


def plain_directories_pass_every_workload():
    disk = sandbox.ext4()
    everything = Everything([disk, disk, disk])
    sandbox.time.sleep(3)
    everything.stop()


def a_lost_write_is_found():
    disk = sandbox.ext4()
    once('writer', dir=disk, id='x', expect=f'{sandbox.WORK}/x', seconds=0.3)
    with open(f'{disk}/w-x-0', 'r+b') as f:
        f.seek(4096 * 7 + 100)
        f.write(b'?')
    result = once('verify-writer', dir=disk, id='x', expect=f'{sandbox.WORK}/x', check=False)
    assert result['errors'] == 1, result


def a_doubled_append_is_found():
    disk = sandbox.ext4()
    result = once('appender', file=f'{disk}/f', id='x', seconds=0.2, block=64)
    with open(f'{disk}/f', 'r+b') as f:
        record = f.read(64)
        f.seek(0, 2)
        f.write(record)
    count = f'x={result["records"]}'
    assert once('verify-appender', file=f'{disk}/f', count=count, block=64, check=False)['errors'] == 1


def a_lock_that_is_given_too_early_is_found():
    disk = sandbox.ext4()
    board = f'{sandbox.WORK}/board'
    holder = Load('lock-holder', file=f'{disk}/f', board=board)
    sandbox.eventually(lambda: os.path.exists(board) and os.path.exists(f'{disk}/f'), 'it holds the lock')
    open(f'{disk}/g', 'w').close()
    waiter = once('lock-waiter', file=f'{disk}/g', board=board, check=False)  # another file: nothing is locked
    assert waiter['errors'] == 1, waiter
    holder.stop()


def trees_are_compared():
    disk = sandbox.ext4()
    for side in ('a', 'b'):
        os.makedirs(f'{disk}/{side}/d')
        with open(f'{disk}/{side}/d/f', 'w') as f:
            f.write('text')
        os.link(f'{disk}/{side}/d/f', f'{disk}/{side}/g')
        for path in ('d/f', 'd', ''):
            os.utime(f'{disk}/{side}/{path}', (1, 1))
    assert_equal(f'{disk}/a', f'{disk}/b')
    os.setxattr(f'{disk}/b/g', 'user.x', b'1')
    assert len(differences(digest(f'{disk}/a'), digest(f'{disk}/b'))) == 2


def the_model_describes_ext4():
    disk = sandbox.ext4()
    for seed in range(1, 6):
        os.mkdir(f'{disk}/{seed}')
        random_test([f'{disk}/{seed}'], seed, steps=600)


def ext4_compares_equal_to_itself():
    disk = sandbox.ext4()
    compare(f'{disk}/one', f'{disk}/two')


if __name__ == '__main__':
    sys.exit(sandbox.main({
        'plain_directories_pass_every_workload': (plain_directories_pass_every_workload, 60),
        'a_lost_write_is_found': (a_lost_write_is_found, 30),
        'a_doubled_append_is_found': (a_doubled_append_is_found, 30),
        'a_lock_that_is_given_too_early_is_found': (a_lock_that_is_given_too_early_is_found, 30),
        'trees_are_compared': (trees_are_compared, 30),
        'the_model_describes_ext4': (the_model_describes_ext4, 60),
        'ext4_compares_equal_to_itself': (ext4_compares_equal_to_itself, 60),
    }))
