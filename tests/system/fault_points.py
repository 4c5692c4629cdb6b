"""The fault points of the handoff, and what section «the handoff» of the design promises for a crash or cut there.

`side`: the process that passes the point. `committed`: the commit point lies before it, so that the target owns in the
end; otherwise the source goes on as owner.
"""

import collections
import pathlib
import re

Point = collections.namedtuple('Point', 'name side committed')

SOURCE = 'source'
TARGET = 'target'
HANDOFF = [
    Point('source.prepare', SOURCE, False),
    Point('source.t0', SOURCE, False),
    Point('image.source.batch', SOURCE, False),
    Point('image.source.end', SOURCE, False),
    Point('source.image_complete', SOURCE, False),
    Point('round.source', SOURCE, False),
    Point('source.round', SOURCE, False),
    Point('source.t1', SOURCE, False),
    Point('source.final_sent', SOURCE, False),
    Point('source.log_applied', SOURCE, False),
    Point('gate.records-durable', SOURCE, False),
    Point('source.before_commit', SOURCE, False),
    Point('source.after_commit', SOURCE, True),
    Point('source.records_sent', SOURCE, True),
    Point('image.target.batch', TARGET, False),
    Point('image.target.end', TARGET, False),
    Point('round.target', TARGET, False),
    Point('target.final_end', TARGET, False),
    Point('final.target', TARGET, False),
    Point('target.before_prepared', TARGET, False),
    Point('target.prepared', TARGET, False),
    Point('target.commit', TARGET, True),
    Point('target.owner', TARGET, True),
    Point('target.record', TARGET, True),
    Point('target.record.stored', TARGET, True),
    Point('target.record.performed', TARGET, True),
    Point('target.performed', TARGET, True),
    Point('target.taken_over', TARGET, True),
]
# Passed only when requests were held, so a load must write fast while the gate is closed.
NEED_RECORDS = {'gate.records-durable', 'target.record', 'target.record.stored', 'target.record.performed'}
# Inside the threads that ship and apply; a cut or an abort there is the same as at their neighbours.
KILL_ONLY = {'image.source.end', 'image.target.batch', 'image.target.end', 'round.source', 'round.target',
             'final.target'}
# Not part of a handoff: the owner performing a request. With the passage at which the test kills it.
REQUEST = {'once.intent': 300, 'once.effect': 300, 'once.outcome': 300, 'store-orphan-moved': 20,
           'store-rename-kept': 20, 'store-delete-orphans': 1}
# A mount has noted a write that it is about to acknowledge: used by test_ahead.py.
MOUNT = ['ahead.noted']
# Passed after a roll-back.
ROLL_BACK = ['gate.reopened']
# What another kernel would do, and when: used by test_restarts.py and test_mount.py.
KERNEL = ['fuse.dropping', 'fuse.prune', 'fuse.pruning']

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent


def in_the_source():
    """The names that production code passes."""
    names = set()
    for folder in ('meta', 'fs', 'replication', 'cli'):
        for file in (REPOSITORY / folder).glob('*.cc'):
            names |= set(re.findall(r'fault_point\("([^"]+)"\)', file.read_text()))
    return names
