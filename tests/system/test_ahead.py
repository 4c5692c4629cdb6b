#!/usr/bin/env python3
"""What a mount acknowledges before the owner has performed it: seen by every look, and lost by no crash and no cut."""

import os
import signal
import sys
import time

import content
import sandbox
from actor import Actor
from cluster import Cluster

PAUSE = ('--max-pause', '2s')
PIECE = 64


def piece(i):
    return b'%063d\n' % i


class Scene:
    """alpha owns; an application on beta writes `f` under a lease."""

    def __init__(self, sites=2, files=('f',)):
        self.cluster = Cluster(sites, content=lambda store: [content.write(f'{store}/{name}', b'') for name in files])
        self.alpha, self.beta = self.cluster[0], self.cluster[1]
        self.writer = Actor(self.beta.mountpoint)
        self.count = 0
        for number, name in enumerate(files, 1):
            assert self.writer.do('open', number, name, os.O_RDWR)[0] == 'ok'
        self.get_lease()

    def write(self, fd=1, timeout=20):
        assert self.writer.do('pwrite', fd, piece(self.count), self.count * PIECE, timeout=timeout) == ('ok', PIECE)
        self.count += 1

    def get_lease(self):
        """It is given with the second write at the latest; a look of somebody else may have been under way."""
        for _ in range(10):
            self.write()

    def write_ahead(self, pieces=20):
        """While the owner is stopped: what returns can only be acknowledged by the mount."""
        self.alpha.signal(signal.SIGSTOP)
        for _ in range(pieces):
            self.write(timeout=1)

    def expected(self):
        return b''.join(piece(i) for i in range(self.count))


def what_is_acknowledged_is_seen_by_every_look():
    """By attributes, listings, reads and locks, at the owner, at a third site and at the writer's own."""
    scene = Scene(3)
    looks = {
        'stat': lambda at: at.do('stat', 'f')[1]['size'],
        'list': lambda at: at.do('list_types') and at.do('stat', 'f')[1]['size'],
        'read': lambda at: len(at.do('content', 'f')[1]),
        'open': lambda at: (at.do('open', 7, 'f', os.O_RDONLY), at.do('fstat', 7)[1]['size'], at.do('close', 7))[1],
    }
    lookers = [Actor(site.mountpoint) for site in scene.cluster] + [scene.writer]
    for turn in range(60):
        for _ in range(turn % 7 + 1):
            scene.write()
        looker = lookers[turn % len(lookers)]
        name, look = list(looks.items())[turn // len(lookers) % len(looks)]
        seen = look(looker)
        assert seen == scene.count * PIECE, f'{name} at {turn % len(lookers)} shows {seen} of {scene.count * PIECE} bytes'
    assert lookers[0].do('content', 'f') == ('ok', scene.expected())
    assert scene.writer.do('close', 1)[0] == 'ok'
    for looker in lookers:
        assert looker.do('content', 'f') == ('ok', scene.expected())


def a_look_waits_for_what_was_acknowledged():
    """The owner does not answer one before it has performed what it was not told of yet."""
    scene = Scene(3)
    scene.write_ahead()
    looker = Actor(scene.cluster[2].mountpoint)
    looker.send('stat', 'f')
    scene.alpha.signal(signal.SIGCONT)
    assert looker.receive()[1]['size'] == scene.count * PIECE
    assert Actor(scene.alpha.mountpoint).do('content', 'f') == ('ok', scene.expected())


def a_writer_sees_what_it_has_written():
    scene = Scene(2)
    other = Actor(scene.beta.mountpoint)
    scene.write_ahead()
    other.send('stat', 'f')
    time.sleep(0.2)
    assert not other.has_answered(), 'told before the owner has performed it'
    scene.alpha.signal(signal.SIGCONT)
    assert other.receive()[1]['size'] == scene.count * PIECE
    assert other.do('content', 'f') == ('ok', scene.expected())
    assert scene.writer.do('fsync', 1)[0] == 'ok'


def truncating_and_appending_come_behind():
    scene = Scene(2)
    other = Actor(scene.beta.mountpoint)
    scene.write_ahead(10)
    other.send('truncate', 'f', 3)
    scene.alpha.signal(signal.SIGCONT)
    assert other.receive()[0] == 'ok'
    assert other.do('open', 1, 'f', os.O_WRONLY | os.O_APPEND)[0] == 'ok'
    assert other.do('write', 1, b'xyz') == ('ok', 3)
    assert Actor(scene.alpha.mountpoint).do('content', 'f') == ('ok', b'000xyz')


def a_killed_mount_loses_nothing():
    """Its next process sends what it had acknowledged, before anybody of its site looks; the owner is asked once."""
    scene = Scene(3)
    scene.write_ahead()
    scene.beta.kill()
    scene.alpha.signal(signal.SIGCONT)
    scene.beta.start()
    for site in scene.cluster:
        assert Actor(site.mountpoint).do('content', 'f') == ('ok', scene.expected())
    scene.cluster.hand_over_and_compare(scene.beta, *PAUSE)


def a_mount_that_is_killed_as_it_notes_a_write():
    scene = Scene(2)
    scene.writer.do('close', 1)
    scene.beta.restart('ahead.noted=kill@30')
    writer = Actor(scene.beta.mountpoint)
    assert writer.do('open', 1, 'f', os.O_WRONLY)[0] == 'ok'
    acknowledged = 0
    while writer.do('pwrite', 1, piece(acknowledged), acknowledged * PIECE) == ('ok', PIECE):
        acknowledged += 1
        assert acknowledged < 1000
    scene.beta.wait_killed()
    scene.beta.start()
    found = Actor(scene.alpha.mountpoint).do('content', 'f')[1]
    assert found[:acknowledged * PIECE] == b''.join(piece(i) for i in range(acknowledged)), acknowledged


def a_killed_owner_waits_for_what_was_acknowledged():
    """Its next process does not know what it has not been told; who looks waits until it is."""
    scene = Scene(3)
    scene.write_ahead()
    scene.alpha.kill()
    scene.alpha.start()
    assert Actor(scene.alpha.mountpoint).do('content', 'f') == ('ok', scene.expected())
    scene.write()
    assert Actor(scene.cluster[2].mountpoint).do('content', 'f') == ('ok', scene.expected())


def both_are_killed():
    scene = Scene(2)
    scene.write_ahead()
    scene.alpha.kill()
    scene.beta.kill()
    scene.alpha.start()
    looker = Actor(scene.alpha.mountpoint)
    looker.send('content', 'f')
    scene.beta.start()
    assert looker.receive() == ('ok', scene.expected())


def cut_off(scene):
    """Writes until the mount does not acknowledge any more; returns how many it has since the cut."""
    scene.cluster.network.cut('beta')
    ahead = 0
    scene.writer.send('pwrite', 1, piece(scene.count), scene.count * PIECE)
    while ahead < 100_000:
        deadline = time.monotonic() + 1
        while not scene.writer.has_answered() and time.monotonic() < deadline:
            time.sleep(0.001)
        if not scene.writer.has_answered():
            return ahead
        assert scene.writer.receive() == ('ok', PIECE)
        scene.count += 1
        ahead += 1
        scene.writer.send('pwrite', 1, piece(scene.count), scene.count * PIECE)
    raise AssertionError('a mount that is cut off goes on acknowledging')


def what_a_site_has_acknowledged_as_it_was_cut_off_comes_late():
    """It stops soon. The others wait for it for 5 s, and see its writes when it is back."""
    scene = Scene(3)
    assert cut_off(scene) > 0
    before = time.monotonic()
    looker = Actor(scene.cluster[2].mountpoint)
    size = looker.do('stat', 'f')[1]['size']
    assert size < scene.count * PIECE
    assert time.monotonic() - before > 2, 'nobody has waited for the site'
    scene.cluster.network.heal('beta')
    assert scene.writer.receive(120) == ('ok', PIECE)
    scene.count += 1
    assert scene.writer.do('fsync', 1)[0] == 'ok'
    for site in scene.cluster:
        assert Actor(site.mountpoint).do('content', 'f') == ('ok', scene.expected())


def what_others_have_written_meanwhile_stays():
    """What a cut-off site had acknowledged does not undo it: its application is told, and its bytes are kept."""
    scene = Scene(2)
    ahead = cut_off(scene)
    assert ahead > 0
    other = Actor(scene.alpha.mountpoint)
    assert other.do('put', 'f', b'new')[0] == 'ok'
    scene.cluster.network.heal('beta')
    # Nobody had acknowledged the last one: it is an ordinary write, and comes behind.
    assert scene.writer.receive(120) == ('ok', PIECE)
    assert scene.writer.do('fsync', 1) == ('errno', 'EIO')
    assert scene.writer.do('close', 1)[0] == 'ok', 'an error is told twice'
    found = other.do('content', 'f')[1]
    assert found[:3] == b'new' and found[-PIECE:] == piece(scene.count), found
    assert found[3:-PIECE].strip(b'\0') == b'', 'acknowledged writes have come over newer ones'
    kept = sandbox.run('find', scene.beta.home, '-path', '*/unwritten/*').stdout.split()
    assert kept and all(os.path.getsize(name) == PIECE for name in kept), kept


def a_writer_that_was_cut_off_and_killed():
    """Its next process is refused what others have written over, and says so."""
    scene = Scene(2)
    assert cut_off(scene) > 0
    assert Actor(scene.alpha.mountpoint).do('put', 'f', b'new')[0] == 'ok'
    scene.beta.kill()
    scene.cluster.network.heal('beta')
    scene.beta.start()
    assert Actor(scene.beta.mountpoint).do('content', 'f') == ('ok', b'new')
    assert 'were not written' in scene.beta.tail(100)


def a_process_that_ends_leaves_nothing_behind():
    """The owner is away as the mount ends in the ordinary way: its next process sends the rest."""
    scene = Scene(2)
    scene.write_ahead()
    scene.writer.kill()
    scene.writer.wait_ended()
    assert 'have not reached the owner' in scene.beta.stop()
    scene.alpha.signal(signal.SIGCONT)
    scene.beta.start()
    assert Actor(scene.alpha.mountpoint).do('content', 'f') == ('ok', scene.expected())


def a_handoff_waits_for_what_was_acknowledged():
    """To a third site, to the writer's own, and back, with a writer that never stops: nothing is missing."""
    scene = Scene(3)
    alpha, beta, gamma = scene.cluster
    for source, target in ((alpha, gamma), (gamma, beta), (beta, alpha), (alpha, gamma)):
        migration = source.migrate_in_background(target, *PAUSE)
        while migration.process.poll() is None:
            scene.write()
        migration.finish()
        assert Actor(target.mountpoint).do('content', 'f') == ('ok', scene.expected())
    assert scene.writer.do('close', 1)[0] == 'ok'
    scene.cluster.hand_over_and_compare(beta, *PAUSE)


def a_silent_writer_does_not_hold_up_a_handoff():
    scene = Scene(3)
    scene.beta.signal(signal.SIGSTOP)
    scene.alpha.migrate(scene.cluster[2], *PAUSE)
    scene.beta.signal(signal.SIGCONT)
    for _ in range(20):
        scene.write()
    assert Actor(scene.alpha.mountpoint).do('content', 'f') == ('ok', scene.expected())


def two_writers_of_one_file_see_each_other():
    """Whoever opens it ends the lease; what both write is there."""
    scene = Scene(2)
    other = Actor(scene.alpha.mountpoint)
    for turn in range(20):
        scene.write()
        scene.write()
        assert other.do('open', 1, 'f', os.O_RDWR)[0] == 'ok'
        assert other.do('pread', 1, PIECE, (scene.count - 1) * PIECE) == ('ok', piece(scene.count - 1)), turn
        assert other.do('pwrite', 1, b'%d' % turn, 0)[0] == 'ok'
        assert scene.writer.do('pread', 1, len(b'%d' % turn), 0) == ('ok', b'%d' % turn)
        assert other.do('close', 1)[0] == 'ok'


def a_full_disk_is_told_at_once():
    """Where there is little room, nothing is acknowledged that may fail."""
    cluster = Cluster(2, stores=[f'{sandbox.ext4("32M")}/store', f'{sandbox.ext4("64M")}/store'], content=lambda store: content.write(f'{store}/f', b''))
    writer = Actor(cluster[1].mountpoint)
    assert writer.do('open', 1, 'f', os.O_RDWR)[0] == 'ok'
    written = 0
    while True:
        result = writer.do('pwrite', 1, b'x' * 65536, written)
        if result[0] == 'errno':
            assert result == ('errno', 'ENOSPC')
            break
        written += result[1]
        assert written < 64 << 20
    assert writer.do('close', 1)[0] == 'ok', 'an error that was told already'
    assert Actor(cluster[0].mountpoint).do('stat', 'f')[1]['size'] == written


if __name__ == '__main__':
    sys.exit(sandbox.main({test.__name__: (test, 120) for test in (
        what_is_acknowledged_is_seen_by_every_look,
        a_look_waits_for_what_was_acknowledged,
        a_writer_sees_what_it_has_written,
        truncating_and_appending_come_behind,
        a_killed_mount_loses_nothing,
        a_mount_that_is_killed_as_it_notes_a_write,
        a_killed_owner_waits_for_what_was_acknowledged,
        both_are_killed,
        what_a_site_has_acknowledged_as_it_was_cut_off_comes_late,
        what_others_have_written_meanwhile_stays,
        a_writer_that_was_cut_off_and_killed,
        a_process_that_ends_leaves_nothing_behind,
        a_handoff_waits_for_what_was_acknowledged,
        a_silent_writer_does_not_hold_up_a_handoff,
        two_writers_of_one_file_see_each_other,
        a_full_disk_is_told_at_once)}))
