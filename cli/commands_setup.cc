#include <spdlog/fmt/fmt.h>

#include <ctime>
#include <iostream>
#include <memory>

#include "cli/commands.h"
#include "cli/control.h"
#include "cli/failure.h"
#include "cli/setup.h"

namespace sharefs {
namespace {

int run_init(const Home& home, const InitOptions& options) {
  init_data_set(home, options);
  OpenState open(home.paths(options.name));
  const std::string store = printable(open.state.setting("store"));
  std::cout << fmt::format("{}: {} adopted in place; this site, {}, is the owner\n", options.name, store,
                           open.state.setting("site"));
  std::cout << fmt::format("next:  sharefs mount {} {}      (or any other empty directory)\n", options.name,
                           store);
  if (!open.state.setting("endpoint").empty()) {
    std::cout << fmt::format("then:  sharefs invite {}      to connect another site\n", options.name);
  }
  return 0;
}

int run_invite(const Home& home, const std::string& name, const std::string& listen) {
  const DataSetPaths paths = home.require(name);
  const Token token = make_invitation(paths, listen.empty() ? std::nullopt : std::optional(listen));
  auto daemon = ControlClient::connect(paths.control_socket());
  if (daemon) {
    const auto answer = daemon->ask({{"command", "reload_invitations"}}, std::chrono::seconds(10));
    if (answer.contains("error")) throw std::runtime_error(answer["error"].get<std::string>());
  }
  std::cout << encode_token(token) << std::endl;
  const std::time_t until = token.expires;
  char time[32];
  std::strftime(time, sizeof time, "%Y-%m-%d %H:%M", std::localtime(&until));
  std::cerr << fmt::format(
      "valid once, until {}; on the other site, which must reach {}:  sharefs join TOKEN --store DIR\n", time,
      token.endpoint);
  if (daemon && !listen.empty()) {
    std::cerr << fmt::format(
        "sharefs: note: unmount and mount {} again on this site, so that it listens on {}\n", name, listen);
  } else if (!daemon) {
    std::cerr << fmt::format(
        "sharefs: note: {} must be mounted or served on this site before the other one joins\n", name);
  }
  return 0;
}

int run_join(const Home& home, const JoinOptions& options) {
  const Joined joined = join_data_set(home, options);
  std::cout << fmt::format("{}: joined as {}; {} is the owner\n", joined.name, joined.site, joined.owner);
  std::cout << fmt::format("next:  sharefs mount {} MOUNTPOINT\n", joined.name);
  return 0;
}

}  // namespace

void add_setup_commands(CLI::App& app, CommandLine& line) {
  auto* init = app.add_subcommand("init", "Make a data set of an existing directory, in place");
  const auto init_options = std::make_shared<InitOptions>();
  init->add_option("NAME", init_options->name, "Name of the data set: 1 to 64 of A-Z a-z 0-9 . _ -")
      ->required();
  init->add_option("--store", init_options->store, "The directory; its files stay where they are")
      ->required();
  init->add_option("--site", init_options->site, "Name of this site (default: the host name)")
      ->check(not_empty);
  init->add_option("--listen", init_options->listen, "tcp://HOST:PORT where other sites reach this one")
      ->check(not_empty);
  init->footer("Example:\n  sharefs init projects --store /srv/projects --listen 'tcp://*:7440'");
  init->callback([&line, init_options] {
    line.run = [&line, init_options] { return run_init(line.home(), *init_options); };
  });

  auto* invite = app.add_subcommand("invite", "Print a token with which one other site can join");
  const auto invite_name = std::make_shared<std::string>();
  const auto invite_listen = std::make_shared<std::string>();
  invite->add_option("NAME", *invite_name, "The data set")->required();
  invite
      ->add_option("--listen", *invite_listen,
                   "Change where other sites reach this one, from its next mount or serve on")
      ->check(not_empty);
  invite->footer(
      "The token is valid once and for 24 hours. Treat it like a password.\n\nExample:\n  sharefs invite "
      "projects");
  invite->callback([&line, invite_name, invite_listen] {
    line.run = [&line, invite_name, invite_listen] {
      return run_invite(line.home(), *invite_name, *invite_listen);
    };
  });

  auto* join = app.add_subcommand("join", "Join a data set with a token from one of its sites");
  const auto join_options = std::make_shared<JoinOptions>();
  join->add_option("TOKEN", join_options->token, "What \"sharefs invite\" printed")->required();
  join->add_option(
          "--store", join_options->store,
          "Directory for this site's copy: empty (made if missing), or an old image of this data set, "
          "which is sent again as a whole")
      ->required();
  join->add_option("--site", join_options->site, "Name of this site (default: the host name)")
      ->check(not_empty);
  join->add_option(
          "--listen", join_options->listen,
          fmt::format("tcp://HOST:PORT where other sites reach this one (default: port {} of this host)",
                      kDefaultPort))
      ->check(not_empty);
  join->footer(
      "Example:\n  sharefs join sharefs1-... --store /srv/projects --listen tcp://beta.example:7440");
  join->callback([&line, join_options] {
    line.run = [&line, join_options] { return run_join(line.home(), *join_options); };
  });
}

}  // namespace sharefs
