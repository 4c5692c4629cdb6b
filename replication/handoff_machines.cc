#include "replication/handoff_machines.h"

#include <array>

namespace sharefs {
namespace {

template <class State, class Event>
struct Transition {
  State from;
  Event event;
  State to;
};

using S = SourceState;
using SE = SourceEvent;
constexpr std::array kSource{
    Transition<S, SE>{S::preparing, SE::prepared, S::imaging},
    Transition<S, SE>{S::imaging, SE::image_complete, S::catching_up},
    Transition<S, SE>{S::catching_up, SE::rest_is_small, S::closing},
    Transition<S, SE>{S::closing, SE::drained, S::finishing},
    Transition<S, SE>{S::finishing, SE::log_applied, S::committing},
    Transition<S, SE>{S::committing, SE::ownership_given, S::committed},
    Transition<S, SE>{S::committed, SE::taken_over, S::done},
    Transition<S, SE>{S::preparing, SE::give_up, S::rolled_back},
    Transition<S, SE>{S::imaging, SE::give_up, S::rolled_back},
    Transition<S, SE>{S::catching_up, SE::give_up, S::rolled_back},
    Transition<S, SE>{S::closing, SE::give_up, S::rolled_back},
    Transition<S, SE>{S::finishing, SE::give_up, S::rolled_back},
    Transition<S, SE>{S::committing, SE::give_up, S::rolled_back},
};

using T = TargetState;
using TE = TargetEvent;
constexpr std::array kTarget{
    Transition<T, TE>{T::receiving, TE::final_end, T::finishing},
    Transition<T, TE>{T::finishing, TE::durable, T::prepared},
    Transition<T, TE>{T::prepared, TE::commit, T::performing},
    Transition<T, TE>{T::performing, TE::performed, T::serving},
    Transition<T, TE>{T::receiving, TE::abandon, T::abandoned},
    Transition<T, TE>{T::finishing, TE::abandon, T::abandoned},
    Transition<T, TE>{T::prepared, TE::abandon, T::abandoned},
};

template <class Table, class State, class Event>
std::optional<State> look_up(const Table& table, State state, Event event) {
  for (const auto& transition : table)
    if (transition.from == state && transition.event == event) return transition.to;
  return std::nullopt;
}

}  // namespace

std::optional<SourceState> next(SourceState state, SourceEvent event) {
  return look_up(kSource, state, event);
}
std::optional<TargetState> next(TargetState state, TargetEvent event) {
  return look_up(kTarget, state, event);
}

std::string_view name(SourceState state) {
  switch (state) {
    case S::preparing:
      return "preparing";
    case S::imaging:
      return "image";
    case S::catching_up:
      return "catch-up";
    case S::closing:
      return "closing";
    case S::finishing:
      return "finishing";
    case S::committing:
      return "committing";
    case S::committed:
      return "committed";
    case S::done:
      return "done";
    case S::rolled_back:
      return "rolled back";
  }
  return "?";
}

std::string_view name(TargetState state) {
  switch (state) {
    case T::receiving:
      return "receiving";
    case T::finishing:
      return "finishing";
    case T::prepared:
      return "prepared";
    case T::performing:
      return "performing";
    case T::serving:
      return "serving";
    case T::abandoned:
      return "abandoned";
  }
  return "?";
}

}  // namespace sharefs
