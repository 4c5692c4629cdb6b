"""A peer that holds the keys of a real site and sends whatever it likes: libzmq through ctypes, messages from protoc."""

import ctypes
import re
import sqlite3
import subprocess
import sys
import time

from fault_points import REPOSITORY

DEALER = 5
with open(f'{REPOSITORY}/replication/transport.h') as f:
    VERSION = int(re.search(r'kProtocolVersion = (\d+);', f.read())[1])
LINGER, PUBLIC, SECRET, SERVER, ROUTING_ID = 17, 48, 49, 50, 5


def settings(home, data_set):
    """The settings of a site's database; None without it."""
    database = sqlite3.connect(f'file:{home}/{data_set}/state.db?mode=ro', uri=True)
    try:
        return {k: v if isinstance(v, str) else bytes(v).decode() for k, v in
                database.execute('SELECT key, value FROM setting')}
    finally:
        database.close()


def envelope(text):
    """The bytes of a pb::Envelope written in protobuf's text format."""
    result = subprocess.run(['protoc', f'-I{REPOSITORY}', '--encode=sharefs.pb.Envelope', 'replication/wire.proto'],
                            input=text.encode(), capture_output=True, cwd=REPOSITORY)
    assert result.returncode == 0, f'{text}: {result.stderr.decode()}'
    return result.stdout


def _main(endpoint, public, secret, server, rounds):
    """Child process: sends each line of stdin (frames in hex, separated by spaces) `rounds` times."""
    zmq = ctypes.CDLL('libzmq.so.5')
    zmq.zmq_ctx_new.restype = zmq.zmq_socket.restype = ctypes.c_void_p
    context = ctypes.c_void_p(zmq.zmq_ctx_new())
    socket = ctypes.c_void_p(zmq.zmq_socket(context, DEALER))
    linger = ctypes.c_int(2000)
    zmq.zmq_setsockopt(socket, LINGER, ctypes.byref(linger), 4)
    for option, key in ((PUBLIC, public), (SECRET, secret), (SERVER, server)):
        assert zmq.zmq_setsockopt(socket, option, key.encode(), 41) == 0
    assert zmq.zmq_connect(socket, endpoint.encode()) == 0
    messages = [[bytes.fromhex(frame.strip('-')) for frame in line.split()] for line in sys.stdin]
    for _ in range(int(rounds)):
        for frames in messages:
            for i, frame in enumerate(frames):
                zmq.zmq_send(socket, frame, len(frame), (2 if i + 1 < len(frames) else 0) | 1)
        time.sleep(0.01)
    time.sleep(0.5)
    zmq.zmq_close(socket)
    zmq.zmq_ctx_term(context)


def send(site, endpoint, keys, server_key, messages, rounds=1):
    """Sends messages (lists of frames) on the network of `site`."""
    lines = '\n'.join(' '.join(frame.hex() or '-' for frame in frames) for frames in messages)
    prefix = site.command()[:-1]
    result = subprocess.run([*prefix, sys.executable, __file__, endpoint, keys['public_key'], keys['secret_key'],
                             server_key, str(rounds)], input=lines, text=True, capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr


if __name__ == '__main__':
    _main(*sys.argv[1:])
