// The commands of `sharefs`, each declared with its options and examples on the CLI11 application.
//
// Parsing only notes what is to be run; main() runs it, so that an error of the command line (exit code 2) is
// never mixed up with one of the work (exit code 1).
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/home.h"

namespace sharefs {

struct CommandLine {
  std::string home_folder;   // --home or SHAREFS_HOME; empty: the default
  std::function<int()> run;  // set by the command that was given; returns the exit code

  Home home() const;  // absolute
};

void add_setup_commands(CLI::App& app, CommandLine& line);    // init, invite, join
void add_mount_commands(CLI::App& app, CommandLine& line);    // mount, serve, umount
void add_handoff_commands(CLI::App& app, CommandLine& line);  // migrate, abort, remove, verify
void add_status_command(CLI::App& app, CommandLine& line);    // status

// A check of options. A variable of a script that is not set, for example: not what leaving the option out
// means.
inline std::string not_empty(const std::string& value) { return value.empty() ? "must not be empty" : ""; }

// The status of a data set, from its daemon if one runs, else from the database.
nlohmann::json read_status(const Home& home, const std::string& name);

}  // namespace sharefs
