"""A network for the sites of one test: a namespace each, joined by a bridge in the test's own namespace."""

import subprocess

from sandbox import run


class Network:
    """Gives each site an address, and cuts and slows the ways between them."""

    def __init__(self):
        self._hosts = {}
        run('ip', 'link', 'add', 'br0', 'type', 'bridge')
        run('ip', 'addr', 'add', '10.77.0.254/24', 'dev', 'br0')
        run('ip', 'link', 'set', 'br0', 'up')

    def add(self, host):
        number = len(self._hosts) + 1
        address = f'10.77.0.{number}'
        run('ip', 'netns', 'add', host)
        run('ip', 'link', 'add', 'eth0', 'netns', host, 'type', 'veth', 'peer', 'name', f'port{number}')
        run('ip', 'link', 'set', f'port{number}', 'master', 'br0', 'up')
        run('ip', '-n', host, 'addr', 'add', f'{address}/24', 'dev', 'eth0')
        run('ip', '-n', host, 'link', 'set', 'eth0', 'up')
        run('ip', '-n', host, 'link', 'set', 'lo', 'up')
        self._hosts[host] = address
        return address

    def inside(self, host):
        """The words to put before a command that shall run on `host`; mounts made there are seen everywhere."""
        return ['nsenter', f'--net=/run/netns/{host}']

    def cut(self, host, other=None, one_way=False):
        """Packets between `host` and `other` (everybody by default) vanish; one way: only those that `host` receives."""
        peers = [self._hosts[other]] if other else [a for h, a in self._hosts.items() if h != host]
        rules = ['table inet cut {', 'chain input { type filter hook input priority 0;']
        rules += [f'ip saddr {peer} drop;' for peer in peers]
        rules += ['}', 'chain output { type filter hook output priority 0;']
        rules += [] if one_way else [f'ip daddr {peer} drop;' for peer in peers]
        rules += ['}', '}']
        subprocess.run([*self.inside(host), 'nft', '-f', '-'], input='\n'.join(rules), text=True, check=True)

    def heal(self, host):
        run(*self.inside(host), 'nft', 'flush', 'ruleset')

    def slow(self, host, kbit):
        """Limits what `host` sends."""
        run(*self.inside(host), 'tc', 'qdisc', 'replace', 'dev', 'eth0', 'root', 'tbf', 'rate', f'{kbit}kbit', 'burst',
            '64kb', 'latency', '50ms')

    def sent(self, host):
        """How many bytes it has sent so far."""
        devices = run(*self.inside(host), 'cat', '/proc/net/dev').stdout
        return int(devices.split('eth0:')[1].split()[8])

    def close(self):
        for host in self._hosts:
            run('ip', 'netns', 'del', host, check=False)
        run('ip', 'link', 'del', 'br0', check=False)

    def describe(self):
        pass


class OneHost(Network):
    """The sites on one host: what they send stays on its loopback interface, as between the other processes there."""

    def add(self, host):
        self._hosts[host] = address = f'10.77.0.{len(self._hosts) + 1}'
        run('ip', 'addr', 'add', f'{address}/24', 'dev', 'br0')
        return address

    def inside(self, host):
        return []

    def close(self):
        run('ip', 'link', 'del', 'br0', check=False)
