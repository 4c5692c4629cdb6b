#include "fs/fuse_session.h"

#include <fcntl.h>
#include <linux/close_range.h>
#include <linux/fuse.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "fs/inode_table.h"
#include "meta/fault.h"

namespace sharefs {
namespace {

constexpr int kInitTimeoutMs = 10'000;
constexpr std::uint64_t kResent = 1ULL << 63;  // FUSE_UNIQUE_RESEND: not part of the request's name
// As in the kernel's header since 7.45.
constexpr unsigned kPruneMinor = 45;
constexpr std::int32_t kNotifyPrune = 9;
struct PruneOut {
  std::uint32_t count, padding;
  std::uint64_t spare;  // `count` ids follow
};
constexpr std::size_t kMostPruned = 512;  // by one message

// FUSE_DIRECT_IO_ALLOW_MMAP (protocol 7.39): append handles are opened direct and may be mapped all the same.
constexpr std::uint64_t kDirectIoAllowMmap = 1ULL << 36;
// Taken when the kernel offers them, whether or not the installed libfuse knows them (3.14 knows of
// FUSE_PARALLEL_DIROPS and forgets to say so).
constexpr std::uint64_t kBehindLibfuse =
    FUSE_PARALLEL_DIROPS | FUSE_HANDLE_KILLPRIV_V2 | FUSE_SETXATTR_EXT | kDirectIoAllowMmap;

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), std::string("FUSE: ") + what);
}

template <class T>
T read_at(std::span<const std::byte> bytes, std::size_t offset) {
  T value{};
  if (bytes.size() >= offset + sizeof value) std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

template <class T>
void write_at(std::span<std::byte> bytes, std::size_t offset, const T& value) {
  std::memcpy(bytes.data() + offset, &value, sizeof value);
}

// All but the standard ones, `one` and `other`.
void close_others(int one, int other) {
  auto from = static_cast<unsigned>(STDERR_FILENO) + 1;
  for (const int kept : {std::min(one, other), std::max(one, other)}) {
    const auto number = static_cast<unsigned>(kept);
    if (kept < 0 || number < from) continue;
    if (number > from) ::syscall(SYS_close_range, from, number - 1, 0);
    from = number + 1;
  }
  ::syscall(SYS_close_range, from, ~0U, 0);
}

// Whatever the kernel says (it does not know the inode), there is nothing to be done about it.
void notify(int device, std::int32_t code, std::span<const std::byte> head,
            std::span<const std::byte> body = {}) {
  fuse_out_header header{};
  header.len = static_cast<std::uint32_t>(sizeof header + head.size() + body.size());
  header.error = code;
  const std::array<iovec, 3> parts{{{&header, sizeof header},
                                    {const_cast<std::byte*>(head.data()), head.size()},
                                    {const_cast<std::byte*>(body.data()), body.size()}}};
  [[maybe_unused]] const ssize_t written = ::writev(device, parts.data(), static_cast<int>(parts.size()));
}

std::size_t read_init(int device, std::span<std::byte> buffer) {
  pollfd ready{.fd = device, .events = POLLIN, .revents = 0};
  while (true) {
    const int count = ::poll(&ready, 1, kInitTimeoutMs);
    if (count == 0) throw std::runtime_error("FUSE: the kernel did not start the mount within 10 s");
    const ssize_t got = count > 0 ? ::read(device, buffer.data(), buffer.size()) : -1;
    if (got >= 0) return static_cast<std::size_t>(got);
    if (errno != EINTR && errno != EAGAIN && errno != ENOENT) fail("cannot read the first request");
  }
}

// What the kernel offers, from its INIT request.
std::uint64_t offered_flags(std::span<const std::byte> request) {
  const auto init = read_at<fuse_init_in>(request, sizeof(fuse_in_header));
  const std::uint64_t high = (init.flags & FUSE_INIT_EXT) != 0 ? init.flags2 : 0;
  return high << 32 | init.flags;
}

// Adds `flags` to libfuse's reply to INIT. Returns what was added: nothing if the reply is an error or of an
// old format.
std::uint64_t amend_reply(std::span<std::byte> reply, std::uint64_t flags) {
  const auto header = read_at<fuse_out_header>(reply, 0);
  if (header.error != 0 || reply.size() < sizeof(fuse_out_header) + sizeof(fuse_init_out)) return 0;
  auto init = read_at<fuse_init_out>(reply, sizeof(fuse_out_header));
  if (flags >> 32 != 0) {
    if ((init.flags & FUSE_INIT_EXT) == 0) init.flags2 = 0;
    init.flags |= FUSE_INIT_EXT;
  }
  init.flags |= static_cast<std::uint32_t>(flags);
  init.flags2 |= static_cast<std::uint32_t>(flags >> 32);
  write_at(reply, sizeof(fuse_out_header), init);
  return flags;
}

// libfuse gets no options but the one it insists on knowing; the others are FuseMount's.
fuse_session* new_session(const fuse_lowlevel_ops& operations, void* userdata) {
  std::string program = "sharefs";
  std::string option = "-omax_read=" + std::to_string(kMaxTransfer);
  std::array<char*, 2> argv{program.data(), option.data()};
  fuse_args args = FUSE_ARGS_INIT(static_cast<int>(argv.size()), argv.data());
  fuse_session* session = fuse_session_new(&args, &operations, sizeof operations, userdata);
  fuse_opt_free_args(&args);
  if (session == nullptr) throw std::runtime_error("FUSE: libfuse refuses to make a session");
  return session;
}

}  // namespace

FuseSession::FuseSession(const fuse_lowlevel_ops& operations, void* userdata, int device)
    : session_(new_session(operations, userdata)) {
  exchange_init(device);
}

FuseSession::~FuseSession() = default;

void FuseSession::exchange_init(int device) {
  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends.data()) != 0)
    fail("socketpair");
  const UniqueFd other_end(ends[1]);
  const std::string path = "/dev/fd/" + std::to_string(ends[0]);
  if (fuse_session_mount(session_.get(), path.c_str()) != 0) {
    ::close(ends[0]);
    throw std::runtime_error("FUSE: libfuse refuses " + path);
  }
  // From here on ends[0] belongs to the session.
  std::vector<std::byte> buffer(kRequestBuffer);
  const std::size_t size = read_init(device, buffer);
  const std::uint64_t offered = offered_flags(std::span(buffer).first(size));
  protocol_minor_ = read_at<fuse_init_in>(buffer, sizeof(fuse_in_header)).minor;
  process(std::span(buffer).first(size));

  const ssize_t got = ::recv(other_end.get(), buffer.data(), buffer.size(), 0);
  if (got < static_cast<ssize_t>(sizeof(fuse_out_header))) fail("libfuse did not answer the first request");
  const auto reply = std::span(buffer).first(static_cast<std::size_t>(got));
  const std::uint64_t added = amend_reply(reply, offered & kBehindLibfuse);
  setxattr_ext_ = (added & FUSE_SETXATTR_EXT) != 0;
  direct_io_allow_mmap_ = (added & kDirectIoAllowMmap) != 0;
  if (::write(device, reply.data(), reply.size()) != got) fail("cannot answer the first request");
  if (read_at<fuse_out_header>(reply, 0).error != 0) {
    throw std::runtime_error("FUSE: this kernel and this libfuse cannot work together");
  }
  if (::dup3(device, ends[0], O_CLOEXEC) < 0) fail("dup3");
}

bool FuseSession::can_prune() const { return protocol_minor_ >= kPruneMinor && !fault_point("fuse.prune"); }

int FuseSession::part_device(int kept) const {
  const int mounted = fuse_session_fd(session_.get());
  if (::unshare(CLONE_FILES) != 0) return mounted;
  close_others(mounted, kept);
  UniqueFd own(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
  auto source = static_cast<std::uint32_t>(mounted);
  if (!own || ::ioctl(own.get(), FUSE_DEV_IOC_CLONE, &source) != 0) return mounted;
  ::close(mounted);
  return own.release();
}

void FuseSession::invalidate(int device, InodeId id, std::int64_t offset, std::int64_t length) {
  const fuse_notify_inval_inode_out what{.ino = id, .off = offset, .len = length};
  notify(device, FUSE_NOTIFY_INVAL_INODE, std::as_bytes(std::span(&what, 1)));
}

void FuseSession::prune(int device, std::span<const std::uint64_t> ids) {
  for (; !ids.empty(); ids = ids.subspan(std::min(ids.size(), kMostPruned))) {
    const auto some = ids.first(std::min(ids.size(), kMostPruned));
    PruneOut what{};
    what.count = static_cast<std::uint32_t>(some.size());
    notify(device, kNotifyPrune, std::as_bytes(std::span(&what, 1)), std::as_bytes(some));
  }
}

void FuseSession::process(std::span<std::byte> request) {
  const auto header = read_at<fuse_in_header>(request, 0);
  constexpr std::size_t kBody = sizeof(fuse_in_header);
  extras_ = Extras{.unique = header.unique & ~kResent};
  switch (header.opcode) {
    case FUSE_WRITE: {
      const std::uint32_t flags = read_at<fuse_write_in>(request, kBody).write_flags;
      extras_.kill_suidgid = (flags & FUSE_WRITE_KILL_SUIDGID) != 0;
      extras_.writes_back = (flags & FUSE_WRITE_CACHE) != 0;
      break;
    }
    case FUSE_SETATTR:
      extras_.kill_suidgid = (read_at<fuse_setattr_in>(request, kBody).valid & FATTR_KILL_SUIDGID) != 0;
      break;
    case FUSE_SETXATTR:
      if (setxattr_ext_ && request.size() > kBody + sizeof(fuse_setxattr_in)) {
        // libfuse shall see the short form, which it would have negotiated.
        const auto in = read_at<fuse_setxattr_in>(request, kBody);
        extras_.kill_sgid = (in.setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID) != 0;
        constexpr std::size_t kShort = kBody + FUSE_COMPAT_SETXATTR_IN_SIZE;
        constexpr std::size_t kLong = kBody + sizeof(fuse_setxattr_in);
        std::memmove(request.data() + kShort, request.data() + kLong, request.size() - kLong);
        request = request.first(request.size() - (kLong - kShort));
        write_at(request, offsetof(fuse_in_header, len), static_cast<std::uint32_t>(request.size()));
      }
      break;
    default:
      break;
  }
  fuse_buf buffer{};
  buffer.size = request.size();
  buffer.mem = request.data();
  fuse_session_process_buf(session_.get(), &buffer);
}

}  // namespace sharefs
