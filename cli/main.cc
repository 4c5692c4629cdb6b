// sharefs: one directory on several machines, whose ownership can move while applications write.

#include <CLI/CLI.hpp>
#include <csignal>
#include <exception>
#include <filesystem>
#include <iostream>

#include "cli/commands.h"
#include "cli/failure.h"
#include "cli/units.h"

namespace sharefs {
namespace {

constexpr int kFailed = 1;
constexpr int kUsage = 2;

constexpr const char* kFooter =
    "A first data set on two machines, alpha and beta:\n"
    "  alpha$ sharefs init projects --store /srv/projects --listen 'tcp://*:7440'\n"
    "  alpha$ sharefs mount projects /srv/projects\n"
    "  alpha$ sharefs invite projects                        (prints TOKEN)\n"
    "  beta$  sharefs join TOKEN --store /srv/projects\n"
    "  beta$  sharefs mount projects /srv/projects           (the same files, over the network)\n"
    "  beta$  sharefs migrate projects --to beta             (now they live on beta)\n\n"
    "\"sharefs COMMAND --help\" explains a command. Exit codes: 0 done, 1 failed, 2 wrong command line,\n"
    "130 interrupted (a handoff goes on).";

int fail_with(const std::string& line, int code) {
  std::cerr << "sharefs: " << printable(line) << "\n";
  return code;
}

// What was asked for and cannot be read (a full disk below the file that it goes to) is not done.
int check_output(int code) {
  if (std::cout.flush() || code != 0) return code;
  return fail_with("cannot write to standard output", kFailed);
}

int run(int argc, const char* const* argv);

// The same as --help, for whoever looks for it there.
void add_help_command(CLI::App& app, CommandLine& line) {
  auto* help = app.add_subcommand("help", "Explain a command");
  const auto command = std::make_shared<std::string>();
  help->add_option("COMMAND", *command, "The command (default: an overview of all)")
      ->check([&app](const std::string& name) {
        const bool known =
            !app.get_subcommands([&](CLI::App* one) { return one->get_name() == name; }).empty();
        return known ? std::string() : "there is no command \"" + name + '"';
      });
  help->footer("Example:\n  sharefs help migrate");
  help->callback([&line, command] {
    line.run = [command] {
      const char* const words[] = {"sharefs", command->c_str(), "--help"};
      const char* const overview[] = {"sharefs", "--help"};
      return command->empty() ? run(2, overview) : run(3, words);
    };
  });
}

int run(int argc, const char* const* argv) {
  CommandLine line;
  CLI::App app("One directory on several machines, whose ownership can move while applications write.",
               "sharefs");
  app.set_version_flag("--version", "sharefs " SHAREFS_VERSION);
  app.add_option(
         "--home", line.home_folder,
         "Folder of this site's state (default: /var/lib/sharefs for root, else $XDG_STATE_HOME/sharefs)")
      ->envname("SHAREFS_HOME")
      ->check(not_empty);
  app.require_subcommand(1);
  app.fallthrough();
  app.footer(kFooter);
  add_setup_commands(app, line);
  add_mount_commands(app, line);
  add_handoff_commands(app, line);
  add_status_command(app, line);
  add_help_command(app, line);
  for (auto* command : app.get_subcommands({}))
    for (auto* option : command->get_options())
      if (option->get_required()) option->check(not_empty);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const std::string unknown =
        app.get_subcommands().empty() && !app.remaining().empty() ? app.remaining().front() : "";
    if (error.get_exit_code() == 0 && unknown.empty()) return app.exit(error);  // --help, --version
    std::string command = "sharefs ";
    for (const auto* chosen : app.get_subcommands()) command += chosen->get_name() + ' ';
    return fail_with((unknown.empty() ? error.what() : "there is no command or option \"" + unknown + "\"") +
                         " (see \"" + command + "--help\")",
                     kUsage);
  }
  return line.run();
}

}  // namespace

Home CommandLine::home() const {
  return Home(home_folder.empty() ? Home::default_folder()
                                  : std::filesystem::absolute(home_folder).lexically_normal());
}

}  // namespace sharefs

int main(int argc, char** argv) {
  // Where the starter ignores it, no child could be waited for, and every one counted as successful.
  std::signal(SIGCHLD, SIG_DFL);
  try {
    return sharefs::check_output(sharefs::run(argc, argv));
  } catch (const sharefs::UsageError& error) {
    return sharefs::fail_with(error.what(), sharefs::kUsage);
  } catch (const std::exception& error) {
    return sharefs::fail_with(error.what(), sharefs::kFailed);
  }
}
