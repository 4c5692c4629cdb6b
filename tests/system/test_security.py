#!/usr/bin/env python3
"""Strangers and hostile peers: wrong keys, replayed tokens, malformed frames. They get nothing and break nothing."""

import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time

import content
import hostile
import sandbox
from actor import Actor
from cluster import DATA_SET, PORT, Cluster
from loads import Load
from sandbox import eventually
from tree import SAME_CONTENT, assert_same, digest

PAUSE = ('--max-pause', '2s')


def a_token_is_valid_once():
    cluster = Cluster(3, mount=False)
    alpha, beta, gamma = cluster
    alpha.start()
    token = cluster.invite()
    cluster.join(beta, token)
    os.rmdir(gamma.store)
    refused = cluster.join(gamma, token, check=False)
    assert refused.returncode != 0 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert not os.path.exists(gamma.store) and os.listdir(gamma.home) == [], 'a refused join leaves something behind'
    assert all(site['site'] != 'gamma' for site in alpha.status()['sites']), 'gamma got in'
    beta.start()
    cluster.wait_connected()
    alpha.restart()  # used tokens are remembered
    assert cluster.join(gamma, token, check=False).returncode != 0
    cluster.join(gamma)
    gamma.start()
    cluster.wait_connected()


def two_sites_have_no_name_or_address_in_common():
    cluster = Cluster(3, mount=False)
    alpha, beta, gamma = cluster
    alpha.start()
    cluster.join(beta)

    def refused(site, listen, what):
        result = gamma.cli('join', cluster.invite(), '--store', gamma.store, '--site', site, '--listen', listen,
                           check=False)
        assert result.returncode != 0 and what in result.stderr, result.stderr

    refused('beta', gamma.listen, f'"sharefs remove {DATA_SET} --site beta"')
    refused('alpha', gamma.listen, '--site')
    refused('gamma', beta.listen, '--listen')
    refused('gamma', alpha.listen, '--listen')
    cluster.join(gamma)
    gamma.start()
    beta.start()
    cluster.wait_connected()


def a_join_whose_answer_got_lost_can_be_made_again():
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start()
    cluster.join(beta)
    with sqlite3.connect(f'{beta.home}/{DATA_SET}/state.db') as database:  # as if it had heard nothing
        database.execute("DELETE FROM setting WHERE key = 'data_set'")
        database.execute('DELETE FROM site')
    database.close()
    cluster.join(beta)
    beta.start()
    cluster.wait_connected()


def a_join_can_be_made_again_under_another_name():
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start()
    cluster.join(beta)
    with sqlite3.connect(f'{beta.home}/{DATA_SET}/state.db') as database:
        database.execute("DELETE FROM setting WHERE key = 'data_set'")
    database.close()
    beta.cli('join', cluster.invite(), '--store', beta.store, '--site', 'bravo', '--listen', beta.listen)
    assert [site['site'] for site in alpha.status()['sites']] == ['bravo'], alpha.status()
    alpha.restart()
    beta.start()
    eventually(lambda: alpha.status()['sites'][0]['connected'], 'bravo is connected')


def an_expired_token_is_refused_by_the_site_that_made_it():
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start()
    token = cluster.invite()
    with sqlite3.connect(f'{alpha.home}/{DATA_SET}/state.db') as database:  # as if the other clock were wrong
        database.execute('UPDATE invitation SET expires = 1')
    database.close()
    refused = cluster.join(beta, token, check=False)
    assert refused.returncode == 1 and 'expired' in refused.stderr, refused
    assert alpha.status()['sites'] == []


def a_store_that_others_may_write_to_moves_nothing_of_theirs():
    """Its private area, replaced by a user's own with a link in it, is not used."""
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    os.chmod(alpha.mountpoint, 0o777)
    alpha.migrate(beta, *PAUSE)
    beta.migrate(alpha, *PAUSE)
    victim = f'{sandbox.WORK}/victim'
    os.mkdir(victim, 0o700)
    open(f'{victim}/secret', 'w').close()
    alpha.migrate(beta, *PAUSE)
    eventually(lambda: not [name for name in os.listdir(alpha.store) if name != '.sharefs'], 'the store is put away')
    replaced = subprocess.run(
        ['setpriv', '--reuid', '65534', '--clear-groups', 'sh', '-c',
         f'cd {alpha.store} && mv .sharefs .x && mkdir -m 700 .sharefs && ln -s {victim} .sharefs/tree'],
        capture_output=True)
    assert replaced.returncode != 0, 'whoever may write to the data set may write to the put-away store'
    os.chmod(alpha.store, 0o777)
    subprocess.run(['setpriv', '--reuid', '65534', '--clear-groups', 'sh', '-c',
                    f'cd {alpha.store} && mv .sharefs .x && mkdir -m 700 .sharefs && ln -s {victim} .sharefs/tree'],
                   check=True)
    beta.migrate_in_background(alpha, *PAUSE).finish(check=False, timeout=20)
    assert os.listdir(victim) == ['secret'], 'a user has moved what only root may move'


def a_site_that_cannot_be_reached_back_is_told_so():
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start()
    beta.cli('join', cluster.invite(), '--store', beta.store, '--site', 'beta', '--listen', 'tcp://beta.invalid:7100')
    refused = beta.cli('mount', DATA_SET, beta.mountpoint, check=False)
    assert refused.returncode == 1 and 'does not reach this site at tcp://beta.invalid:7100' in refused.stderr, refused
    beta.start(serve=True)  # which waits for nobody
    sandbox.eventually(lambda: 'does not reach this site at tcp://beta.invalid:7100' in beta.cli('status').stdout, 'status says so')


def a_site_whose_address_has_changed_is_found():
    """By those that it finds where they were; and after their restart, since they have noted it."""
    cluster = Cluster(3)
    alpha, beta, gamma = cluster
    gamma.stop()
    alpha.stop()
    sandbox.run('ip', '-n', 'alpha', 'addr', 'add', '10.77.0.100/24', 'dev', 'eth0')
    sandbox.run('ip', '-n', 'alpha', 'addr', 'del', f'{alpha.address}/24', 'dev', 'eth0')
    sandbox.run('ip', '-n', 'alpha', 'addr', 'replace', '10.77.0.100/24', 'dev', 'eth0')
    failed = alpha.cli('mount', DATA_SET, alpha.mountpoint, check=False)
    assert failed.returncode == 1 and 'sharefs invite NAME --listen' in failed.stderr, failed
    alpha.cli('invite', DATA_SET, '--listen', f'tcp://10.77.0.100:{PORT}')
    alpha.start()
    sandbox.eventually(lambda: [s['connected'] for s in beta.status()['sites'] if s['site'] == 'alpha'] == [True],
                       'beta finds the owner')
    assert Actor(beta.mountpoint).do('put', 'found', b'it')[0] == 'ok'
    beta.stop()
    known = {s['site']: s['endpoint'] for s in beta.status()['sites']}
    assert known['alpha'] == f'tcp://10.77.0.100:{PORT}', known
    beta.start()
    gamma.start()
    beta.migrate(gamma, '--max-pause', '2s')
    gamma.migrate(alpha, '--max-pause', '2s')


def a_site_of_another_version_is_told_so():
    cluster = Cluster(2)
    alpha, beta = cluster
    keys = hostile.settings(beta.home, DATA_SET)
    server = hostile.settings(alpha.home, DATA_SET)['public_key']
    beta.stop()
    hello = hostile.envelope(f'hello {{ data_set: {keys["data_set_id"]} version: 9000 incarnation: 5 epoch: 1 }}')
    hostile.send(beta, alpha.listen, keys, server, [[hello]])
    refused = alpha.migrate(beta, check=False)
    assert refused['exit'] == 1 and 'install the same release on both' in refused['error'], refused
    beta.start()
    alpha.migrate(beta, '--max-pause', '2s')


def a_machine_that_does_not_come_back_is_removed():
    """What it had locked is free, nobody waits for it, nobody lets it in again, and its name can be given anew."""
    cluster = Cluster(3)
    alpha, beta, gamma = cluster

    def others_of(site):
        return [one['site'] for one in site.status()['sites']]

    def lock(site):
        actor = Actor(site.mountpoint)
        actor.do('open', 'file', 'file', os.O_RDWR | os.O_CREAT)
        return actor.do('lock', 'file', 'w', 0, 10)[0]

    assert lock(gamma) == 'ok' and lock(alpha) == 'errno'
    refused = beta.cli('remove', DATA_SET, '--site', 'gamma', check=False)
    assert refused.returncode == 1 and f'"sharefs umount {DATA_SET}"' in refused.stderr, refused.stderr
    refused = alpha.cli('remove', DATA_SET, '--site', 'alpha', check=False)
    assert refused.returncode == 1 and 'owner' in refused.stderr, refused.stderr
    gamma.kill()
    beta.stop()
    sandbox.eventually(lambda: not alpha.status()['sites'][1]['connected'], 'alpha misses gamma')
    assert lock(alpha) == 'errno', 'a lock of a site that may come back is given away'
    alpha.cli('remove', DATA_SET, '--site', 'gamma')
    assert lock(alpha) == 'ok', 'gamma still has its lock'
    beta.start()  # it was away meanwhile, and knows gamma
    sandbox.eventually(lambda: others_of(alpha) == ['beta'] and others_of(beta) == ['alpha'], 'gamma is forgotten')

    # Also by those who become the owner later, and by their next processes.
    alpha.migrate(beta)
    alpha.restart()
    beta.restart()
    cluster.wait_agreed(beta)
    assert others_of(alpha) == ['beta'] and others_of(beta) == ['alpha']
    began = time.monotonic()
    os.mkdir(f'{beta.mountpoint}/new')
    assert time.monotonic() - began < 2, 'a change waits for a site that was removed'
    back = gamma.cli('mount', DATA_SET, gamma.mountpoint, check=False)
    assert back.returncode != 0 and 'does not accept the key' in back.stderr, back.stderr
    gamma.kill()

    shutil.rmtree(f'{gamma.home}/{DATA_SET}')
    shutil.rmtree(gamma.store)
    os.mkdir(gamma.store)
    cluster.join(gamma, beta.cli('invite', DATA_SET).stdout.strip())
    gamma.start()
    cluster.wait_connected()
    assert os.path.isdir(f'{gamma.mountpoint}/new')
    beta.migrate(gamma, '--max-pause', '2s')
    cluster.wait_agreed(gamma)
    alpha.restart()  # says what it knows to everybody
    cluster.wait_connected()
    for site in cluster:
        assert 'not believed' not in site.tail(), 'the new owner is taken for who had its name before'
    gamma.migrate(alpha, '--max-pause', '2s')
    gamma.stop()
    alpha.cli('remove', DATA_SET, '--site', 'gamma')  # by one that has become the owner just now
    assert others_of(alpha) == ['beta']


def a_site_that_was_removed_says_so():
    cluster = Cluster(2)
    alpha, beta = cluster
    beta.stop()
    beta.start(serve=True)
    # Not: «does not reach this site», since both are just connecting.
    assert 'connected' in beta.cli('status', DATA_SET).stdout
    cluster.wait_connected()
    alpha.cli('remove', DATA_SET, '--site', 'beta')
    sandbox.eventually(lambda: "refuses this site's key" in beta.cli('status', DATA_SET).stdout, 'it is said')
    assert beta.status()['sites'][0]['refused'], beta.status()


def verify_ends_when_the_other_site_does():
    def files(store):
        content.small(store, files=3000)
    cluster = Cluster(2, content=files)
    alpha, beta = cluster
    alpha.migrate(beta)
    beta.signal(signal.SIGSTOP)
    asking = subprocess.Popen(alpha.command('verify', DATA_SET), env=alpha.environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    beta.kill()
    assert asking.wait(20) == 1 and 'beta' in asking.stderr.read()
    beta.start()
    cluster.wait_connected()
    cluster.verify(alpha, beta)


def a_changed_token_is_refused():
    cluster = Cluster(2, mount=False)
    alpha, beta = cluster
    alpha.start()
    token = cluster.invite()
    r = random.Random(5)
    for _ in range(6):
        at = r.randrange(len(token) // 2, len(token))
        other = r.choice([c for c in 'abcdefgh0123' if c != token[at]])
        refused = cluster.join(beta, token[:at] + other + token[at + 1:], check=False)
        assert refused.returncode != 0 and refused.stderr.strip(), 'a changed token was accepted'
    assert not alpha.status()['sites']
    cluster.join(beta, token)


def _change_settings(site, **values):
    database = sqlite3.connect(f'{site.home}/{DATA_SET}/state.db')
    for key, value in values.items():
        database.execute('UPDATE setting SET value = ? WHERE key = ?', (value, key))
    database.commit()
    database.close()


def a_wrong_key_is_not_let_in():
    cluster = Cluster(3)
    alpha, beta, gamma = cluster
    cluster.wait_connected()
    gamma.stop()
    home = gamma.home
    gamma.home = f'{sandbox.WORK}/stranger-home'
    os.mkdir(f'{sandbox.WORK}/stranger-store')
    gamma.cli('init', DATA_SET, '--store', f'{sandbox.WORK}/stranger-store', '--listen', 'tcp://127.0.0.1:9999')
    stranger = hostile.settings(gamma.home, DATA_SET)
    gamma.home = home
    own = hostile.settings(gamma.home, DATA_SET)
    _change_settings(gamma, public_key=stranger['public_key'], secret_key=stranger['secret_key'])
    gamma.process = None
    try:
        gamma.start(serve=True)
    except AssertionError:
        pass  # it may as well refuse to start
    time.sleep(3)
    for site in (alpha, beta):
        known = {s['site']: s['connected'] for s in site.status()['sites']}
        assert not known['gamma'], f'{site.name} is connected to a stranger'
    if gamma.running():
        assert not any(s['connected'] for s in gamma.status()['sites'])
    gamma.kill()
    _change_settings(gamma, public_key=own['public_key'], secret_key=own['secret_key'])
    gamma.start()
    cluster.wait_connected()
    assert Actor(gamma.mountpoint).do('list')[0] == 'ok'


def garbage_on_the_port_breaks_nothing():
    cluster = Cluster(2, content=content.small)
    alpha = cluster[0]
    before = digest(alpha.mountpoint, SAME_CONTENT)
    load = Load('writer', dir=cluster[1].mountpoint, id='w', rate=200)
    time.sleep(0.2)
    r = random.Random(1)
    greeting = b'\xff' + bytes(8) + b'\x7f' + b'\x03\x01' + b'NULL'.ljust(20, b'\0') + b'\0' + bytes(31)
    curve = greeting.replace(b'NULL' + bytes(16), b'CURVE' + bytes(15))
    openings = [b'', b'GET / HTTP/1.1\r\n\r\n', greeting, curve, curve + b'\x06' + b'\xff' * 8,
                greeting + b'\x04\x29\x05READY' + bytes(40), curve + b'\x04\xc8\x05HELLO' + bytes(194)]
    kept = []
    for i in range(300):
        s = socket.create_connection((alpha.address, PORT), timeout=5)
        s.settimeout(1)
        try:
            s.sendall(openings[i % len(openings)] + r.randbytes(r.choice((0, 10, 1000, 100_000))))
        except OSError:
            pass  # thrown out already
        kept.append(s)
    for s in kept:
        s.close()
    load.stop()
    for name in ('w-w-%d' % i for i in range(8)):
        Actor(alpha.mountpoint).do('unlink', name)
    before.pop(b''), (after := digest(alpha.mountpoint, SAME_CONTENT)).pop(b'')
    assert_same(before, after, 'the tree was changed')
    assert alpha.memory_peak() < 256
    cluster.wait_connected()
    alpha.migrate(cluster[1], '--max-pause', '2s')


def strangers_who_say_nothing_take_no_descriptors_from_files():
    alpha, = Cluster(1, content=lambda store: [content.write(f'{store}/f{i}', b'x') for i in range(100)], mount=False)
    alpha.start(limits=['--nofile=1024:8192'])
    resource.setrlimit(resource.RLIMIT_NOFILE, (20000, 20000))
    kept = []

    def has_kept_them():
        for _ in range(20):
            kept.append(socket.socket())
            kept[-1].setblocking(False)
            kept[-1].connect_ex((alpha.address, PORT))
        return len(os.listdir(f'/proc/{alpha.process.pid}/fd')) > 1020

    try:
        eventually(has_kept_them, 'it keeps as many', every=0.02)
        for i in range(100):
            with open(f'{alpha.mountpoint}/f{i}', 'rb') as f:
                assert f.read() == b'x'
            content.write(f'{alpha.mountpoint}/new{i}', b'x')
    finally:
        for s in kept:
            s.close()


EVIL_NAMES = (r'../../evil', r'/mnt/evil', r'..', r'.', r'', r'a/b', r'x\000y', r'.sharefs')


def _evil_requests():
    """Envelopes that a broken or hostile site could send: names that leave the tree, ids and sizes without sense."""
    client = 'client: 77 seq: {seq} uid: 0 gid: 0'
    texts = [f'ask {{ request {{ {client} attach {{ site: "beta" }} }} }}']
    for name in EVIL_NAMES:
        for root in (1, 0, 12345678901234):
            texts += [f'ask {{ request {{ {client} create {{ parent: {root} name: "{name}" mode: 33188 }} }} }}',
                      f'ask {{ request {{ {client} mkdir {{ parent: {root} name: "{name}" mode: 493 }} }} }}',
                      f'ask {{ request {{ {client} symlink {{ parent: {root} name: "{name}" target: "/etc" }} }} }}',
                      f'ask {{ request {{ {client} lookup {{ parent: {root} name: "{name}" }} }} }}',
                      f'ask {{ request {{ {client} unlink {{ parent: {root} name: "{name}" }} }} }}',
                      f'ask {{ request {{ {client} rmdir {{ parent: {root} name: "{name}" }} }} }}',
                      f'ask {{ request {{ {client} link {{ id: 2 parent: {root} name: "{name}" }} }} }}',
                      f'ask {{ request {{ {client} rename {{ parent: {root} name: "{name}" new_parent: {root} '
                      f'new_name: "{name}x" }} }} }}']
    huge = 2**64 - 1
    texts += [f'ask {{ request {{ {client} read {{ id: 1 handle: 5 offset: {huge} size: 4294967295 }} }} }}',
              f'ask {{ request {{ {client} write {{ id: 1 handle: 5 offset: {huge} size: 4294967295 }} }} }}',
              f'ask {{ request {{ {client} readdir {{ id: 1 max_bytes: 4294967295 offset: {huge} plus: true }} }} }}',
              f'ask {{ request {{ {client} setattr {{ id: 0 size: {huge} }} }} }}',
              f'ask {{ request {{ {client} open {{ id: {huge} handle: {huge} flags: {2**32 - 1} }} }} }}',
              f'ask {{ request {{ {client} forget {{ ids: 1 ids: 2 ids: 3 }} }} }}',
              f'ask {{ request {{ {client} }} }}', 'ask { }']
    texts = [text.replace('{seq}', str(1000 + i)) for i, text in enumerate(texts)]
    attempt = 'attempt: 99'
    texts += [f'commit {{ {attempt} epoch: 1000000 records: 0 }}', f'log_applied {{ {attempt} }}',
              f'taken_over {{ {attempt} epoch: 1000000 }}', f'final_end {{ {attempt} batches: {huge} }}',
              f'image_end {{ {attempt} }}', f'batch {{ {attempt} number: 1 checksum: 5 compressed: true }}',
              f'manifest {{ {attempt} number: 1 inodes {{ id: 1 }} }}', f'need {{ {attempt} number: 1 }}',
              f'credit {{ {attempt} bytes: {huge} }}', f'record {{ {attempt} number: 1 }}',
              f'verdict {{ {attempt} committed: true epoch: 1000000 owner: "beta" }}',
              f'inquire {{ {attempt} epoch: 1000000 }}', f'abandon {{ {attempt} }}',
              'moved { client: 77 seq: 1 epoch: 1000000 owner: "beta" }', 'recall { number: 1 client: 77 id: 1 }',
              'recall_done { number: 1 referenced: true }', 'verify_ask { number: 1 count: 4294967295 }',
              'command { number: 1 text: "not json" }', 'command { number: 1 text: "{\\"command\\": 5}" }',
              'command_reply { number: 1 text: "[" }', 'join { version: 9 }', 'answer { client: 77 seq: 1 }',
              'hello { version: 999999 epoch: 5 owner: "beta" }']
    return [hostile.envelope(text) for text in texts]


def malformed_messages_of_a_known_site_break_nothing():
    cluster = Cluster(2, content=content.small)
    alpha, beta = cluster
    keys = hostile.settings(beta.home, DATA_SET)
    server = hostile.settings(alpha.home, DATA_SET)['public_key']
    hello = hostile.envelope(f'hello {{ data_set: {keys["data_set_id"]} version: {hostile.VERSION} incarnation: 5 epoch: 1 '
                             'owner: "alpha" }')
    beta.stop()
    before = digest(alpha.mountpoint, SAME_CONTENT)
    outside = digest(f'{sandbox.WORK}/alpha', ('mode',)).keys()
    valid = _evil_requests()
    r = random.Random(3)
    hostile.send(beta, alpha.listen, keys, server, [[hello], *([m] for m in valid)])
    hostile.send(beta, alpha.listen, keys, server, [[hello], *([m, r.randbytes(50)] for m in valid)])
    flipped = []
    for _ in range(1500):
        message = bytearray(r.choice(valid)) or bytearray(1)
        for _ in range(r.choice((1, 1, 2, 5))):
            message[r.randrange(len(message))] = r.randrange(256)
        frames = [bytes(message[:r.randrange(len(message) + 1)] if r.random() < 0.3 else message)]
        frames += [r.randbytes(r.choice((0, 1, 100, 5000))) for _ in range(r.choice((0, 0, 1, 2, 20)))]
        flipped.append(frames)
    hostile.send(beta, alpha.listen, keys, server, [[hello], *flipped])
    hostile.send(beta, alpha.listen, keys, server, [[r.randbytes(r.randrange(200)) for _ in range(r.randrange(1, 4))]
                                                    for _ in range(500)])
    nested = '{"command": "migrate", "to": "beta", "x": ' + '[' * 500_000 + ']' * 500_000 + '}'
    deep = hostile.envelope(f"command {{ number: 1 text: '{nested}' }}")
    hostile.send(beta, alpha.listen, keys, server, [[hello], [deep]])
    time.sleep(1)
    assert alpha.running(), f'the owner ended with {alpha.process.returncode}: {alpha.tail(5)}'
    assert alpha.status()['role'] == 'owner', 'a message took ownership away'
    assert digest(f'{sandbox.WORK}/alpha', ('mode',)).keys() == outside, 'something was made outside of the store'
    assert not os.path.exists(f'{sandbox.WORK}/evil') and not os.path.exists('/mnt/evil')
    after = digest(alpha.mountpoint, SAME_CONTENT)
    for tree in (before, after):  # beta may change what it likes inside the tree, but not by names that leave it
        tree.pop(b'')
    assert before.keys() == {p for p in after if not p.startswith((b'evil', b'x'))}, 'names came or went'
    assert alpha.memory_peak() < 256, f'{alpha.memory_peak():.0f} MiB resident'
    beta.start()
    cluster.wait_connected()
    assert Actor(beta.mountpoint).do('put', 'after', b'all is well')[0] == 'ok'

    def handed_over():  # the nested command asks for that, too, which may be under way
        alpha.migrate(beta, '--max-pause', '2s', check=False)
        return beta.status()['role'] == 'owner'
    sandbox.eventually(handed_over, 'the handoff to beta')


def only_who_was_asked_answers_a_command():
    """The owner does not answer; a third site says in its place that all is done."""
    cluster = Cluster(3)
    alpha, beta, gamma = cluster
    keys = hostile.settings(gamma.home, DATA_SET)
    asked = hostile.settings(beta.home, DATA_SET)
    gamma.stop()
    first = int(asked['client'])  # numbers of commands begin with it
    hello = hostile.envelope(f'hello {{ data_set: {keys["data_set_id"]} version: {hostile.VERSION} incarnation: 5 epoch: 1 '
                             'owner: "alpha" }')
    replies = [[hostile.envelope(f'command_reply {{ number: {number} text: \'{{"result": "aborted"}}\' }}')]
               for number in range(first, first + 20)]
    alpha.signal(signal.SIGSTOP)
    command = subprocess.Popen(beta.command('abort', DATA_SET), env=beta.environment(), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    hostile.send(gamma, beta.listen, keys, asked['public_key'], [[hello], *replies])
    alpha.signal(signal.SIGCONT)
    out, err = command.communicate(timeout=60)
    assert command.returncode == 1, f'{command.returncode} {out} {err}'


def records_that_no_handoff_sends_are_ignored():
    """A member says that it is the owner, and sends one with the number 0, or before there is anything to perform."""
    cluster = Cluster(2)
    alpha, beta = cluster
    keys = hostile.settings(beta.home, DATA_SET)
    server = hostile.settings(alpha.home, DATA_SET)['public_key']
    alpha.migrate(beta, '--max-pause', '2s')
    cluster.wait_agreed(beta)
    beta.stop()
    hello = hostile.envelope(f'hello {{ data_set: {keys["data_set_id"]} version: {hostile.VERSION} incarnation: 5 epoch: 2 '
                             'owner: "beta" power: 1 connection: 9 }')
    prepare = hostile.envelope(f'prepare {{ attempt: 7 epoch: 3 version: {hostile.VERSION} }}')
    records = [[hostile.envelope(f'record {{ attempt: 7 number: {number} request {{ client: 5 seq: 1 '
                                 'mkdir { parent: 1 name: "x" } } }'), b'x'] for number in (0, 1)]
    hostile.send(beta, alpha.listen, keys, server, [[hello], [prepare], *records], rounds=3)
    time.sleep(1)
    assert alpha.running(), alpha.tail(3)
    beta.start()
    cluster.wait_connected()
    refused = beta.migrate(alpha, '--max-pause', '2s', check=False)
    assert 'epoch 3 is not newer' in refused['error'], refused  # alpha has believed the attempt of that epoch
    cluster.hand_over_and_compare(alpha, '--max-pause', '2s')
    assert 'x' not in os.listdir(alpha.mountpoint)


def what_a_member_says_of_other_sites_is_bounded():
    """It names sites and removed ones without end, some that cannot be, the owner's key among them, and an owner that
    nobody knows. Who has heard it says so once, and goes on."""
    cluster = Cluster(3)
    alpha, beta, gamma = cluster
    keys = hostile.settings(beta.home, DATA_SET)
    server = {site.name: hostile.settings(site.home, DATA_SET)['public_key'] for site in cluster}
    cluster.wait_connected()  # what is said counts from a site that answers

    def site(name, key):
        return f'{{ name: "{name}" endpoint: "tcp://10.77.0.99:9" public_key: "{key}" }}'

    def hello(*lists, owner='alpha', epoch=1):
        return [hostile.envelope(f'hello {{ data_set: {keys["data_set_id"]} version: {hostile.VERSION} '
                                 f'incarnation: {keys["client"]} epoch: {epoch} owner: "{owner}" {" ".join(lists)} }}')]

    def rows(where, table):
        database = sqlite3.connect(f'file:{where.home}/{DATA_SET}/state.db?mode=ro', uri=True)
        try:
            return database.execute(f'SELECT name, public_key FROM {table}').fetchall()
        finally:
            database.close()

    named = [hello(*(f'sites {site(f"s{i}", f"{i:040}")}' for i in range(at, at + 10))) for at in range(0, 200, 10)]
    gone = [hello(*(f'removed {site(f"r{i}", f"{i:040}")}' for i in range(at, at + 300)))
            for at in range(1000, 4000, 300)]
    impossible = [hello(f'removed {site("x" * 100_000, "0" * 40)}', f'removed {site("x" * 100_000, "0" * 39 + "z")}', f'removed {site("x", "no key")}'),
                  hello(f'removed {site("x", server["alpha"])}'),
                  hello(f'sites {site("/", "1" * 40)}'),
                  hello(owner='nobody', epoch=7)]
    long = hello(*(f'removed {site(f"r{i}", f"{i:040}")}' for i in range(5000, 15000)))
    hostile.send(beta, alpha.listen, keys, server['alpha'], named)
    os.makedirs(f'{sandbox.WORK}/another/store')
    full = alpha.cli('join', cluster.invite(), '--store', f'{sandbox.WORK}/another/store', '--site', 'delta', '--listen',
                     f'tcp://{alpha.address}:7999', '--home', f'{sandbox.WORK}/another/home', check=False)
    assert full.returncode == 1 and 'take one out' in full.stderr, full
    for where in (alpha, gamma):
        hostile.send(beta, where.listen, keys, server[where.name], named + gone + impossible + [long], rounds=5)
    beta.restart()
    cluster.wait_connected()
    for where in (alpha, gamma):
        sites, removed = rows(where, 'site'), rows(where, 'removed_site')
        assert 10 < len(sites) <= 50, len(sites)
        assert 100 < len(removed) <= 1100, len(removed)
        strange = [row for row in sites + removed if len(row[0]) > 10 or len(row[1]) != 40]
        assert not strange, strange
        said = [line for line in where.tail(1000).splitlines() if 'beta' in line and ('believed' in line or 'names' in line)]
        assert 1 <= len(said) <= 4, said
        assert where.status()['owner'] == 'alpha' and not where.status()['contested'], where.status()
    assert 'alpha' in dict(rows(gamma, 'site')), 'the owner was taken for another one'
    assert Actor(gamma.mountpoint).do('put', 'after', b'all is well')[0] == 'ok'
    beta.stop()
    alpha.cli('remove', DATA_SET, '--site', 'beta')
    assert server['beta'] in dict((key, name) for name, key in rows(alpha, 'removed_site')), 'nobody can be removed any more'
    alpha.migrate(gamma, '--max-pause', '2s')


if __name__ == '__main__':
    sys.exit(sandbox.main({
        'a_token_is_valid_once': (a_token_is_valid_once, 60),
        'two_sites_have_no_name_or_address_in_common': (two_sites_have_no_name_or_address_in_common, 60),
        'a_join_whose_answer_got_lost_can_be_made_again': (a_join_whose_answer_got_lost_can_be_made_again, 60),
        'a_join_can_be_made_again_under_another_name': (a_join_can_be_made_again_under_another_name, 60),
        'a_site_that_cannot_be_reached_back_is_told_so': (a_site_that_cannot_be_reached_back_is_told_so, 60),
        'a_site_whose_address_has_changed_is_found': (a_site_whose_address_has_changed_is_found, 90),
        'a_site_of_another_version_is_told_so': (a_site_of_another_version_is_told_so, 60),
        'an_expired_token_is_refused_by_the_site_that_made_it':
            (an_expired_token_is_refused_by_the_site_that_made_it, 60),
        'a_store_that_others_may_write_to_moves_nothing_of_theirs':
            (a_store_that_others_may_write_to_moves_nothing_of_theirs, 60),
        'a_changed_token_is_refused': (a_changed_token_is_refused, 60),
        'a_machine_that_does_not_come_back_is_removed': (a_machine_that_does_not_come_back_is_removed, 90),
        'a_site_that_was_removed_says_so': (a_site_that_was_removed_says_so, 60),
        'verify_ends_when_the_other_site_does': (verify_ends_when_the_other_site_does, 60),
        'a_wrong_key_is_not_let_in': (a_wrong_key_is_not_let_in, 60),
        'garbage_on_the_port_breaks_nothing': (garbage_on_the_port_breaks_nothing, 60),
        'strangers_who_say_nothing_take_no_descriptors_from_files':
            (strangers_who_say_nothing_take_no_descriptors_from_files, 60),
        'records_that_no_handoff_sends_are_ignored': (records_that_no_handoff_sends_are_ignored, 60),
        'only_who_was_asked_answers_a_command': (only_who_was_asked_answers_a_command, 60),
        'what_a_member_says_of_other_sites_is_bounded': (what_a_member_says_of_other_sites_is_bounded, 60),
        'malformed_messages_of_a_known_site_break_nothing': (malformed_messages_of_a_known_site_break_nothing, 90),
    }))
