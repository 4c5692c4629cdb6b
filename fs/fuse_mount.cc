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
constexpr unsigned kMoveMountBeneath = 0x200;  // since Linux 6.5; unknown to older headers

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

// Options of mount(8) that are attributes of the mount. All others (ro, sync, max_read=) are of the file
// system.
struct MountFlag {
  const char* name;
  unsigned set;
  unsigned clear;
};
constexpr std::array kMountFlags{
    MountFlag{"nosuid", MOUNT_ATTR_NOSUID, 0},
    MountFlag{"suid", 0, MOUNT_ATTR_NOSUID},
    MountFlag{"nodev", MOUNT_ATTR_NODEV, 0},
    MountFlag{"dev", 0, MOUNT_ATTR_NODEV},
    MountFlag{"noexec", MOUNT_ATTR_NOEXEC, 0},
    MountFlag{"exec", 0, MOUNT_ATTR_NOEXEC},
    MountFlag{"noatime", MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME},
    MountFlag{"atime", 0, MOUNT_ATTR_NOATIME},
    MountFlag{"relatime", 0, MOUNT_ATTR__ATIME},
    MountFlag{"strictatime", MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME},
    MountFlag{"nodiratime", MOUNT_ATTR_NODIRATIME, 0},
    MountFlag{"diratime", 0, MOUNT_ATTR_NODIRATIME},
};

// KEY or KEY=VALUE; EINVAL says that it is not one of the kernel's.
bool set_option(const UniqueFd& context, const std::string& option) {
  const std::size_t equals = option.find('=');
  if (equals == std::string::npos)
    return ::fsconfig(context.get(), FSCONFIG_SET_FLAG, option.c_str(), nullptr, 0) == 0;
  return ::fsconfig(context.get(), FSCONFIG_SET_STRING, option.substr(0, equals).c_str(),
                    option.substr(equals + 1).c_str(), 0) == 0;
}

[[noreturn]] void refuse_as_root(const std::filesystem::path& mountpoint, int error) {
  switch (error) {
    case EPERM:
      refuse(mountpoint, "no permission (mounting needs CAP_SYS_ADMIN)");
    case ENODEV:
      refuse(mountpoint, "the kernel has no FUSE (try: modprobe fuse)");
    default:
      refuse(mountpoint, error_text(error));
  }
}

// A mount that is not anywhere yet.
UniqueFd make_mount(const std::filesystem::path& mountpoint, const std::string& source,
                    const std::vector<std::string>& options, const UniqueFd& device) {
  const UniqueFd context(::fsopen("fuse", FSOPEN_CLOEXEC));
  if (!context) refuse_as_root(mountpoint, errno);
  const std::string directory = "40000";  // octal, as all of "rootmode"
  for (const std::string& option :
       {"source=" + source, std::string("subtype=sharefs"), "fd=" + std::to_string(device.get()),
        "rootmode=" + directory, "user_id=" + std::to_string(::getuid()),
        "group_id=" + std::to_string(::getgid()), "max_read=" + std::to_string(kMaxTransfer),
        std::string("default_permissions"), std::string("allow_other")})
    if (!set_option(context, option)) refuse_as_root(mountpoint, errno);
  unsigned flags = 0;  // as a disk of root's: devices and setuid programs work, unless -o says otherwise
  for (const std::string& option : options) {
    const auto* known = std::find_if(kMountFlags.begin(), kMountFlags.end(),
                                     [&option](const MountFlag& flag) { return option == flag.name; });
    if (known != kMountFlags.end())
      flags = (flags & ~known->clear) | known->set;
    else if (!set_option(context, option))
      refuse(mountpoint, errno == EINVAL ? "the kernel does not know -o " + option : error_text(errno));
  }
  if (::fsconfig(context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) != 0)
    refuse_as_root(mountpoint, errno);
  UniqueFd mount(::fsmount(context.get(), FSMOUNT_CLOEXEC, flags));
  if (!mount) refuse_as_root(mountpoint, errno);
  return mount;
}

UniqueFd mount_as_root(const std::filesystem::path& mountpoint, const std::string& source,
                       const std::vector<std::string>& options, bool dead) {
  UniqueFd device(::open(kDevice, O_RDWR | O_CLOEXEC));
  if (!device) refuse(mountpoint, std::string(kDevice) + ": " + error_text(errno) + " (try: modprobe fuse)");
  const UniqueFd mount = make_mount(mountpoint, source, options, device);
  const auto attach = [&](unsigned how) {
    return ::move_mount(mount.get(), "", AT_FDCWD, mountpoint.c_str(), MOVE_MOUNT_F_EMPTY_PATH | how) == 0;
  };
  const bool beneath = dead && attach(kMoveMountBeneath);
  if (dead) unmount(mountpoint, Unmount::lazy);
  if (!beneath && !attach(0)) refuse_as_root(mountpoint, errno);
  return device;
}

// Makes sure that something can be mounted there; returns whether a dead mount is in its place.
bool prepare(const std::filesystem::path& mountpoint) {
  if (::access(kDevice, F_OK) != 0) refuse(mountpoint, "there is no /dev/fuse (try: modprobe fuse)");
  if (is_dead_mount(mountpoint)) return true;
  struct stat status {};
  if (::stat(mountpoint.c_str(), &status) != 0)
    refuse(mountpoint,
           errno == ENOENT ? "the directory does not exist (create it first)" : error_text(errno));
  if (!S_ISDIR(status.st_mode)) refuse(mountpoint, "not a directory");
  return false;
}

}  // namespace

FuseMount::FuseMount(const std::filesystem::path& mountpoint, const std::string& source,
                     const std::vector<std::string>& options)
    : mountpoint_(resolve_mountpoint(mountpoint)) {
  const bool dead = prepare(mountpoint_);
  const std::vector<std::string> single = split(options);
  if (dead && !is_root()) unmount(mountpoint_, Unmount::lazy);
  device_ = is_root() ? mount_as_root(mountpoint_, source, single, dead)
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
