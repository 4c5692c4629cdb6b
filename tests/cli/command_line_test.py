#!/usr/bin/env python3
"""The binary itself, where no mount and no second site are needed: what it prints, where, and its exit codes."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import unittest

SHAREFS = sys.argv.pop(1)
COMMANDS = ('init', 'invite', 'join', 'mount', 'serve', 'umount', 'migrate', 'abort', 'remove', 'status', 'verify', 'help')


class CommandLine(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix='sharefs-cli-')
        self.addCleanup(scratch.cleanup)
        self.folder = os.path.realpath(scratch.name)
        self.home = f'{self.folder}/home'
        self.store = f'{self.folder}/store'
        os.mkdir(self.store)

    def run_sharefs(self, *words, home=True, **environment):
        if home:
            environment['SHAREFS_HOME'] = self.home
        return subprocess.run([SHAREFS, *words], capture_output=True, text=True, timeout=60,
                              env={'PATH': os.environ['PATH'], 'HOME': self.folder} | environment)

    def succeeds(self, *words, **more):
        result = self.run_sharefs(*words, **more)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result

    def fails(self, code, part, *words):
        result = self.run_sharefs(*words)
        self.assertEqual(result.returncode, code, result.stderr)
        self.assertRegex(result.stderr, '^sharefs: [^\n]*\n$')
        self.assertIn(part, result.stderr)
        self.assertEqual(result.stdout, '')

    def init(self, *more):
        return self.succeeds('init', 'projects', '--store', self.store, '--site', 'alpha', *more)

    def test_help_has_examples_for_every_command(self):
        self.assertIn('sharefs', self.succeeds('--version').stdout)
        overview = self.succeeds('--help').stdout
        for command in COMMANDS:
            self.assertIn(command, overview)
            self.assertIn(f'  sharefs {command}', self.succeeds(command, '--help').stdout)

    def test_help_is_a_command_too(self):
        overview = self.succeeds('--help').stdout
        self.assertEqual(self.succeeds('help').stdout, overview)
        self.assertIn('130 interrupted', overview)
        for command in COMMANDS:
            self.assertEqual(self.succeeds('help', command).stdout, self.succeeds(command, '--help').stdout)
        self.fails(2, '"frobnicate"', 'help', 'frobnicate')
        self.fails(2, 'no command ""', 'help', '')
        self.fails(2, '"frobnicate"', 'frobnicate', '--help')

    def test_nothing_is_put_over_or_into_the_state_folder(self):
        """A mount there would hide the data set from every later command."""
        self.init()
        os.mkdir(f'{self.home}/free')
        for where in (f'{self.home}/projects', f'{self.home}/free', '/proc', '/proc/sys'):
            self.fails(1, 'hidden', 'mount', 'projects', where)
        self.fails(1, 'inside the state folder', 'init', 'more', '--store', f'{self.home}/free', '--site', 'alpha')
        self.assertEqual(os.listdir(f'{self.home}/free'), [])

    def test_names_that_are_not_text_keep_the_lines_apart(self):
        self.store = f'{self.folder}/a\n\x1b[31mb'
        os.mkdir(self.store)
        for said in (self.init().stdout, self.succeeds('status').stdout):
            self.assertNotIn('\x1b', said)
            self.assertIn('/a??[31mb', said)

    def test_a_wrong_command_line_is_exit_2_and_one_line(self):
        self.fails(2, 'subcommand')
        self.fails(2, '"frobnicate"', 'frobnicate')
        self.fails(2, 'NAME', 'mount')
        self.fails(2, '--to', 'migrate', 'projects')
        self.fails(2, 'see "sharefs migrate --help"', 'migrate', 'projects')
        self.fails(2, '--max-pause', 'migrate', 'projects', '--to', 'beta', '--max-pause', '100')
        self.fails(2, '--rate', 'migrate', 'projects', '--to', 'beta', '--rate', 'fast')
        self.fails(2, 'name of a data set', 'init', 'a b', '--store', self.store)
        for option in ('--site', '--listen'):
            self.fails(2, option, 'init', 'projects', '--store', self.store, option, '')
        self.fails(2, 'tcp://', 'init', 'projects', '--store', self.store, '--listen', 'host')
        for words in (('init', '', '--store', self.store), ('init', 'projects', '--store', ''), ('umount', ''), ('mount', 'x', ''),
                      ('migrate', 'projects', '--to', ''), ('migrate', 'projects', '--to', 'beta', '--rate', ''),
                      ('mount', 'projects', '/mnt', '--timeout', ''), ('verify', 'projects', '--with', ''), ('status', '--home', '')):
            self.fails(2, 'must not be empty', *words)
        self.fails(2, '"fro?bnicate"', 'fro\nbnicate')

    def test_what_cannot_be_done_is_exit_1_and_one_line(self):
        self.fails(1, 'No such file', 'init', 'projects', '--store', f'{self.folder}/missing')
        for words in (('mount', 'projects', '/mnt'), ('serve', 'projects'), ('invite', 'projects'), ('abort', 'projects'),
                      ('migrate', 'projects', '--to', 'beta'), ('verify', 'projects'), ('status', 'projects')):
            self.fails(1, 'no data set "projects"', *words)
        self.fails(1, 'not a token', 'join', 'nonsense', '--store', f'{self.folder}/b')
        self.init()
        self.fails(1, 'already initialised', 'init', 'projects', '--store', self.store)
        self.fails(1, 'not running', 'migrate', 'projects', '--to', 'beta')
        self.fails(1, 'not running', 'abort', 'projects')
        self.fails(1, 'not mounted', 'umount', 'projects')
        self.fails(1, 'neither a data set nor the mount point', 'umount', self.store)
        self.fails(1, 'sharefs: nix is neither', 'umount', 'nix')
        self.fails(1, 'does not listen', 'invite', 'projects')
        self.fails(1, 'two?lines is neither', 'umount', f'{self.folder}/two\nlines')
        os.mkdir(f'{self.store}/sub')
        self.fails(1, 'inside the store', 'mount', 'projects', f'{self.store}/sub')
        self.fails(1, 'hidden', 'mount', 'projects', self.folder)
        self.fails(1, 'does not exist', 'mount', 'projects', f'{self.folder}/nowhere')
        os.symlink('gone', f'{self.folder}/link')
        os.symlink(f'{self.folder}/link', f'{self.folder}/link to a link')
        for link in ('link', 'link to a link'):
            self.fails(1, f'does not exist: mkdir -p {self.folder}/gone\n', 'mount', 'projects', f'{self.folder}/{link}')

    def test_a_log_that_cannot_be_written_is_one_line_on_standard_error(self):
        self.init('--listen', 'tcp://127.0.0.1:9')
        os.mkdir(f'{self.home}/projects/sharefs.log')
        self.fails(1, 'sharefs.log: Is a directory', 'serve', 'projects')

    def test_output_that_nobody_gets_is_no_success(self):
        self.init()
        for words in (('status',), ('status', 'projects', '--json'), ('--help',)):
            with open('/dev/full', 'w') as full:
                result = subprocess.run([SHAREFS, *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
                                        env={'SHAREFS_HOME': self.home})
            self.assertEqual((result.returncode, result.stderr), (1, 'sharefs: cannot write to standard output\n'))

    def test_init_says_what_comes_next(self):
        self.assertIn(f'sharefs mount projects {self.store}', self.init().stdout)

    def test_invite_prints_the_token_alone_on_standard_output(self):
        with socket.create_server(('127.0.0.1', 0)) as taken:
            endpoint = f'tcp://127.0.0.1:{taken.getsockname()[1]}'
            self.fails(1, f'cannot listen on {endpoint}', 'init', 'projects', '--store', self.store, '--listen', endpoint)
        self.init('--listen', endpoint)
        token = self.succeeds('invite', 'projects').stdout
        self.assertRegex(token, '^sharefs1-[A-Za-z0-9_-]+\n$')
        self.assertNotEqual(token, self.succeeds('invite', 'projects').stdout)

    def test_status_without_a_daemon_comes_from_the_database(self):
        self.assertIn('no data sets', self.succeeds('status').stdout)
        self.init()
        status = json.loads(self.succeeds('status', 'projects', '--json').stdout)
        for key in ('name', 'site', 'role', 'owner', 'epoch', 'phase', 'mountpoint', 'store', 'sites', 'handoff'):
            self.assertIn(key, status)
        self.assertEqual((status['name'], status['site'], status['role'], status['owner'], status['epoch']),
                         ('projects', 'alpha', 'owner', 'alpha', 1))
        self.assertIs(status['running'], False)
        self.assertEqual([one['name'] for one in json.loads(self.succeeds('status', '--json').stdout)], ['projects'])
        self.assertIn('not running', self.succeeds('status', 'projects').stdout)

    def test_a_data_set_whose_state_is_damaged_does_not_stand_in_the_way_of_others(self):
        self.init()
        os.makedirs(f'{self.home}/broken')
        with open(f'{self.home}/broken/state.db', 'wb') as f:
            f.write(b'no database' * 1000)
        listed = self.run_sharefs('status', '--json')
        self.assertEqual(listed.returncode, 1)
        broken, projects = json.loads(listed.stdout)
        self.assertEqual((broken['name'], projects['name'], projects['role']), ('broken', 'projects', 'owner'))
        self.assertIn('broken/state.db', broken['error'])
        self.assertIn('broken/state.db', self.run_sharefs('status').stdout)
        self.fails(1, 'broken/state.db', 'status', 'broken')
        os.mkdir(f'{self.folder}/more')
        made = self.succeeds('init', 'more', '--store', f'{self.folder}/more', '--site', 'alpha')
        self.assertIn('leaving out broken', made.stderr)

    def test_migrate_with_json_gives_scripts_an_object_even_when_it_fails(self):
        self.init()
        result = self.run_sharefs('migrate', 'projects', '--to', 'beta', '--json')
        self.assertEqual(result.returncode, 1)
        answer = json.loads(result.stdout.splitlines()[-1])
        self.assertEqual(answer['result'], 'failed')
        self.assertIn('not running', answer['error'])

    def test_home_comes_from_the_option_then_the_environment_then_the_user(self):
        self.init()
        elsewhere = f'{self.folder}/elsewhere'
        self.assertEqual(json.loads(self.succeeds('--home', elsewhere, 'status', '--json').stdout), [])
        self.assertEqual(json.loads(self.succeeds('status', '--json', '--home', elsewhere).stdout), [])
        self.assertEqual(len(json.loads(self.succeeds('status', '--json').stdout)), 1)
        if os.geteuid() != 0:
            os.mkdir(f'{self.folder}/state')
            os.rename(self.home, f'{self.folder}/state/sharefs')
            result = self.succeeds('status', '--json', home=False, XDG_STATE_HOME=f'{self.folder}/state')
            self.assertEqual(len(json.loads(result.stdout)), 1)


if __name__ == '__main__':
    unittest.main()
