// libfuse's session on a device that this process mounted itself.
//
// The FUSE_INIT exchange is ours: libfuse answers it into a socket, what libfuse has no word for is added to
// the reply, and only then does the session get the device. So capabilities newer than the installed libfuse
// are negotiated (FUSE_HANDLE_KILLPRIV_V2 spares a GETXATTR before every write); the bits of requests that
// come with them are taken from the raw bytes, see Extras.
//
// Threads: one (the reactor's), except that notifications may be sent from any.
#pragma once

#define FUSE_USE_VERSION FUSE_MAKE_VERSION(3, 12)
#include <fuse_lowlevel.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "meta/types.h"

namespace sharefs {

// The most bytes that one READ or WRITE carries.
constexpr std::size_t kMaxTransfer = 1U << 20;
// A request is read into a buffer of this size: the kernel refuses to fill a smaller one.
constexpr std::size_t kRequestBuffer = kMaxTransfer + 8192;

// Whether the kernel of this protocol (7.minor) keeps the pages that it writes back until that is answered
// (since Linux 6.16).
constexpr bool keeps_written_pages(unsigned minor) { return minor >= 44; }

class FuseSession {
 public:
  // What the header of the request being processed says and libfuse does not pass on.
  struct Extras {
    std::uint64_t unique = 0;
    bool kill_suidgid = false;  // WRITE, SETATTR: the caller lacks CAP_FSETID
    bool writes_back = false;   // WRITE: of what was stored in a mapping
    bool kill_sgid = false;     // SETXATTR of an ACL: the caller is not of the file's group
  };

  // `device`: fresh from FuseMount, not yet read from. Performs the INIT exchange (blocking: the kernel sends
  // INIT at the mount). The session works on a duplicate. Throws std::runtime_error.
  FuseSession(const fuse_lowlevel_ops& operations, void* userdata, int device);
  ~FuseSession();
  FuseSession(const FuseSession&) = delete;
  FuseSession& operator=(const FuseSession&) = delete;

  // Dispatches one request as read from the device; may change its bytes.
  void process(std::span<std::byte> request);
  const Extras& extras() const { return extras_; }

  // Notifications may wait in the kernel for what only this process answers. If it is killed the kernel ends
  // that when the device is closed by which this was asked: so a thread that notifies has a device of its
  // own, which this returns, and of the descriptors of the process only `kept`. Once per thread, which closes
  // it by ending.
  int part_device(int kept = -1) const;

  // Makes the kernel drop what it has cached of an inode: its attributes, and unless `offset` is negative,
  // pages. May wait for what is still to be written back.
  static void invalidate(int device, InodeId id, std::int64_t offset, std::int64_t length);
  // Makes the kernel let go of the names of inodes that nobody uses, and of the inodes, which it forgets
  // then (FUSE_NOTIFY_PRUNE, since Linux 6.18). May wait, too.
  bool can_prune() const;
  static void prune(int device, std::span<const std::uint64_t> ids);

  // What is read and written past the pages of the kernel comes after what was stored in them (since
  // Linux 6.6).
  bool writes_back_before_direct() const { return direct_io_allow_mmap_; }

  unsigned protocol_minor() const { return protocol_minor_; }  // of the kernel: 7.minor

  fuse_session* get() const { return session_.get(); }

 private:
  struct Destroy {
    void operator()(fuse_session* session) const { fuse_session_destroy(session); }
  };
  void exchange_init(int device);

  std::unique_ptr<fuse_session, Destroy> session_;
  bool setxattr_ext_ = false;  // negotiated, as the next one
  bool direct_io_allow_mmap_ = false;
  unsigned protocol_minor_ = 0;
  Extras extras_;
};

}  // namespace sharefs
