#include "fs/fuse_mount.h"

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "fs/fuse_helper.h"
#include "fs/fuse_session.h"
#include "fs/mounts.h"

namespace sharefs {
namespace {

constexpr const char* kDevice = "/dev/fuse";
constexpr const char* kHelperConfiguration = "/etc/fuse.conf";

[[noreturn]] void refuse(const std::filesystem::path& mountpoint, const std::string& why) {
  throw std::runtime_error("cannot mount on " + mountpoint.string() + ": " + why);
}

std::string error_text(int error) { return std::generic_category().message(error); }

bool is_root() { return ::geteuid() == 0; }

std::vector<std::string> split(const std::vector<std::string>& options) {
  std::vector<std::string> single;
  for (const std::string& option : options) {
    for (std::size_t start = 0; start <= option.size();) {
      const std::size_t end = std::min(option.find(',', start), option.size());
      if (end > start) single.push_back(option.substr(start, end - start));
      start = end + 1;
    }
  }
  return single;
}

void append(std::string& list, const std::string& option) {
  if (!list.empty()) list += ',';
  list += option;
}

// ---- the helper of ordinary users

UniqueFd receive_descriptor(int socket) {
  std::array<char, 1> byte{};
  iovec data{.iov_base = byte.data(), .iov_len = byte.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  msghdr message{};
  message.msg_iov = &data;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t got = 0;
  while ((got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {
  }
  const cmsghdr* header = got > 0 ? CMSG_FIRSTHDR(&message) : nullptr;
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) return UniqueFd();
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return UniqueFd(fd);
}

bool others_allowed() {
  std::ifstream file(kHelperConfiguration);
  for (std::string line; std::getline(file, line);) {
    const auto end = line.find_last_not_of(" \t\r");
    if (end != std::string::npos && line.substr(0, end + 1) == "user_allow_other") return true;
  }
  return false;
}

UniqueFd mount_with_helper(const std::filesystem::path& mountpoint, const std::string& source,
                           const std::vector<std::string>& options) {
  std::string list =
      "fsname=" + source + ",subtype=sharefs,default_permissions,max_read=" + std::to_string(kMaxTransfer);
  if (others_allowed()) append(list, "allow_other");
  for (const std::string& option : options) append(list, option);

  std::array<int, 2> ends{};
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0)
    refuse(mountpoint, error_text(errno));
  const UniqueFd ours(ends[0]);
  UniqueFd theirs(ends[1]);
  const FusermountResult result = run_fusermount({"-o", list, "--", mountpoint.string()}, theirs.get());
  theirs = UniqueFd();
  if (result.status != 0) refuse(mountpoint, result.message);
  UniqueFd device = receive_descriptor(ours.get());
  if (!device) refuse(mountpoint, "fusermount3 did not pass the device on");
  return device;
}

// ---- root

// Options of mount(8) that are flags of mount(2). Set ones are added to, cleared ones taken from the default.
struct MountFlag {
  const char* name;
  unsigned long flag;
  bool set;
};
constexpr std::array kMountFlags{
    MountFlag{"ro", MS_RDONLY, true},
    MountFlag{"rw", MS_RDONLY, false},
    MountFlag{"nosuid", MS_NOSUID, true},
    MountFlag{"suid", MS_NOSUID, false},
    MountFlag{"nodev", MS_NODEV, true},
    MountFlag{"dev", MS_NODEV, false},
    MountFlag{"noexec", MS_NOEXEC, true},
    MountFlag{"exec", MS_NOEXEC, false},
    MountFlag{"sync", MS_SYNCHRONOUS, true},
    MountFlag{"async", MS_SYNCHRONOUS, false},
    MountFlag{"dirsync", MS_DIRSYNC, true},
    MountFlag{"noatime", MS_NOATIME, true},
    MountFlag{"atime", MS_NOATIME, false},
    MountFlag{"nodiratime", MS_NODIRATIME, true},
    MountFlag{"diratime", MS_NODIRATIME, false},
    MountFlag{"relatime", MS_RELATIME, true},
};

struct MountArguments {
  unsigned long flags = 0;  // as a disk of root's: devices and setuid programs work, unless -o says otherwise
  std::string data;
  std::string left_to_kernel;  // options that are its own, or nobody's
};

MountArguments mount_arguments(const std::vector<std::string>& options, int device, unsigned root_mode) {
  MountArguments arguments;
  std::array<char, 32> mode{};
  std::snprintf(mode.data(), mode.size(), "%o", root_mode & S_IFMT);
  arguments.data = "fd=" + std::to_string(device) + ",rootmode=" + mode.data() +
                   ",user_id=" + std::to_string(::getuid()) + ",group_id=" + std::to_string(::getgid()) +
                   ",max_read=" + std::to_string(kMaxTransfer) + ",default_permissions,allow_other";
  for (const std::string& option : options) {
    const auto* known = std::find_if(kMountFlags.begin(), kMountFlags.end(),
                                     [&option](const MountFlag& flag) { return option == flag.name; });
    if (known == kMountFlags.end()) {
      append(arguments.data, option);
      append(arguments.left_to_kernel, option);
    } else {
      arguments.flags = known->set ? arguments.flags | known->flag : arguments.flags & ~known->flag;
    }
  }
  return arguments;
}

UniqueFd mount_as_root(const std::filesystem::path& mountpoint, const std::string& source,
                       const std::vector<std::string>& options, unsigned root_mode) {
  UniqueFd device(::open(kDevice, O_RDWR | O_CLOEXEC));
  if (!device) refuse(mountpoint, std::string(kDevice) + ": " + error_text(errno) + " (try: modprobe fuse)");
  const MountArguments arguments = mount_arguments(options, device.get(), root_mode);
  if (::mount(source.c_str(), mountpoint.c_str(), "fuse.sharefs", arguments.flags, arguments.data.c_str()) ==
      0) {
    return device;
  }
  switch (errno) {
    case EPERM:
      refuse(mountpoint, "no permission (mounting needs CAP_SYS_ADMIN)");
    case EINVAL:
      refuse(mountpoint, arguments.left_to_kernel.empty()
                             ? error_text(errno)
                             : "the kernel does not know -o " + arguments.left_to_kernel);
    case ENODEV:
      refuse(mountpoint, "the kernel has no FUSE (try: modprobe fuse)");
    default:
      refuse(mountpoint, error_text(errno));
  }
}

// Makes sure that something can be mounted there; returns the mode of the directory.
unsigned prepare(const std::filesystem::path& mountpoint) {
  struct stat status {};
  int result = ::stat(mountpoint.c_str(), &status);
  if (result != 0 && errno == ENOTCONN) {
    unmount(mountpoint, Unmount::lazy);  // a dead mount
    result = ::stat(mountpoint.c_str(), &status);
  }
  if (result != 0 && errno == ENOENT) refuse(mountpoint, "the directory does not exist (create it first)");
  if (result != 0) refuse(mountpoint, error_text(errno));
  if (!S_ISDIR(status.st_mode)) refuse(mountpoint, "not a directory");
  if (::access(kDevice, F_OK) != 0) refuse(mountpoint, "there is no /dev/fuse (try: modprobe fuse)");
  return status.st_mode;
}

}  // namespace

FuseMount::FuseMount(const std::filesystem::path& mountpoint, const std::string& source,
                     const std::vector<std::string>& options) {
  const unsigned root_mode = prepare(mountpoint);
  mountpoint_ = std::filesystem::canonical(mountpoint);
  const std::vector<std::string> single = split(options);
  device_ = is_root() ? mount_as_root(mountpoint_, source, single, root_mode)
                      : mount_with_helper(mountpoint_, source, single);
  if (const auto mounted = fuse_mount_at(mountpoint_)) mounted_as_ = mounted->device;
}

FuseMount::~FuseMount() { detach(); }

// Ours may have been taken away already, and go on in another namespace or in files that are open; then what
// is at that path is somebody else's: the disk of the store, when it is mounted over that.
void FuseMount::detach() {
  if (mountpoint_.empty()) return;
  const auto top = mount_at(mountpoint_);
  if (top && top->device == mounted_as_) unmount(mountpoint_, Unmount::lazy);
  mountpoint_.clear();
}

}  // namespace sharefs
