// A Store on a real directory, asked through execute() as everything else asks it.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fs/live_state.h"
#include "fs/store.h"
#include "meta/reactor.h"
#include "tests/fs/temporary_directory.h"

namespace sharefs {

struct Answer {
  pb::Outcome outcome;
  std::string data;
  int error() const { return static_cast<int>(outcome.error()); }
  InodeId id() const { return outcome.attr().id(); }
};

// Remembers every change, in words.
class RecordingObserver final : public ChangeObserver {
 public:
  void changing(const Change& change) override {
    static constexpr const char* kKinds[] = {"entry", "attributes", "extent", "freed"};
    std::string line = std::string(kKinds[static_cast<int>(change.kind)]) + " " + std::to_string(change.id);
    if (change.kind == Change::Kind::entry) line += " " + change.name;
    if (change.kind == Change::Kind::extent)
      line += " " + std::to_string(change.offset) + "+" + std::to_string(change.length);
    lines.push_back(line);
    if (on_change) on_change();
  }
  bool has(const std::string& line) const {
    return std::find(lines.begin(), lines.end(), line) != lines.end();
  }
  std::vector<std::string> lines;
  std::function<void()> on_change;
};

// The parameter: whether file handles are used, or parent and name as without privilege.
class StoreFixture : public testing::TestWithParam<bool> {
 protected:
  StoreFixture() {
    std::filesystem::create_directory(tree());
    std::filesystem::permissions(tree(), std::filesystem::perms(0755));
    start();
  }
  void SetUp() override {
    if (GetParam() && !inodes_->uses_handles()) GTEST_SKIP() << "file handles need privilege";
  }

  std::filesystem::path tree() const { return directory_.path() / "store"; }
  std::filesystem::path path(const std::string& name) const { return tree() / name; }

  void start() {
    InodeTable::Options options;
    options.use_handles = GetParam();
    stop();
    inodes_ = std::make_unique<InodeTable>(
        directory_.path() / "state.db", directory_.path() / "journal",
        UniqueFd(::open(tree().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)), options);
    inodes_->set_epoch(1);
    store_ = std::make_unique<Store>(Store::Options{.directory = tree(), .data_set = "test"}, *inodes_,
                                     opens_, locks_, workers_);
  }
  void stop() {
    store_.reset();
    inodes_.reset();
  }
  void restart() { start(); }  // as a new process would

  Answer ask(const pb::Request& request, std::string_view data = {}) {
    std::optional<Answer> answer;
    store_->execute(request, as_bytes(data), [&](const pb::Outcome& outcome, Bytes bytes) {
      answer = Answer{outcome, std::string(as_text(bytes))};
      reactor_.stop();
    });
    reactor_.run();
    EXPECT_TRUE(answer.has_value());
    return answer.value_or(Answer{});
  }

  pb::Request request() const {
    pb::Request result;
    result.set_client(1);
    result.set_uid(uid);
    result.set_gid(gid);
    return result;
  }

#define SHAREFS_ASK(type, field) \
  pb::Request r = request();     \
  pb::type& op = *r.mutable_##field()

  Answer lookup(InodeId parent, const std::string& name) {
    SHAREFS_ASK(Lookup, lookup);
    op.set_parent(parent);
    op.set_name(name);
    return ask(r);
  }
  Answer getattr(InodeId id) {
    SHAREFS_ASK(GetAttr, getattr);
    op.set_id(id);
    return ask(r);
  }
  Answer create(InodeId parent, const std::string& name, std::uint32_t mode = 0644,
                std::uint32_t flags = O_RDWR, std::uint32_t umask = 0) {
    SHAREFS_ASK(Create, create);
    op.set_parent(parent);
    op.set_name(name);
    op.set_mode(S_IFREG | mode);
    op.set_umask(umask);
    op.set_handle(++handle_);
    op.set_flags(flags | O_CREAT);
    return ask(r);
  }
  Answer mknod(InodeId parent, const std::string& name, std::uint32_t mode, std::uint64_t rdev = 0) {
    SHAREFS_ASK(Create, create);
    op.set_parent(parent);
    op.set_name(name);
    op.set_mode(mode);
    op.set_rdev(rdev);
    return ask(r);
  }
  Answer mkdir(InodeId parent, const std::string& name, std::uint32_t mode = 0755) {
    SHAREFS_ASK(MkDir, mkdir);
    op.set_parent(parent);
    op.set_name(name);
    op.set_mode(mode);
    return ask(r);
  }
  Answer symlink(InodeId parent, const std::string& name, const std::string& target) {
    SHAREFS_ASK(SymLink, symlink);
    op.set_parent(parent);
    op.set_name(name);
    op.set_target(target);
    return ask(r);
  }
  Answer link(InodeId id, InodeId parent, const std::string& name) {
    SHAREFS_ASK(Link, link);
    op.set_id(id);
    op.set_parent(parent);
    op.set_name(name);
    return ask(r);
  }
  Answer unlink(InodeId parent, const std::string& name) {
    SHAREFS_ASK(Unlink, unlink);
    op.set_parent(parent);
    op.set_name(name);
    return ask(r);
  }
  Answer rmdir(InodeId parent, const std::string& name) {
    SHAREFS_ASK(RmDir, rmdir);
    op.set_parent(parent);
    op.set_name(name);
    return ask(r);
  }
  Answer rename(InodeId parent, const std::string& name, InodeId new_parent, const std::string& new_name,
                std::uint32_t flags = 0) {
    SHAREFS_ASK(Rename, rename);
    op.set_parent(parent);
    op.set_name(name);
    op.set_new_parent(new_parent);
    op.set_new_name(new_name);
    op.set_flags(flags);
    return ask(r);
  }
  Answer forget(InodeId id) {
    SHAREFS_ASK(Forget, forget);
    op.add_ids(id);
    return ask(r);
  }
  Answer open(InodeId id, std::uint32_t flags) {
    SHAREFS_ASK(Open, open);
    op.set_id(id);
    op.set_flags(flags);
    return ask(r);
  }
  Answer read(InodeId id, std::uint64_t offset, std::uint32_t size) {
    SHAREFS_ASK(Read, read);
    op.set_id(id);
    op.set_offset(offset);
    op.set_size(size);
    return ask(r);
  }
  Answer write(InodeId id, std::uint64_t offset, const std::string& data, bool append = false,
               bool kill = false, bool sync = false) {
    SHAREFS_ASK(Write, write);
    op.set_id(id);
    op.set_offset(offset);
    op.set_size(static_cast<std::uint32_t>(data.size()));
    op.set_append(append);
    op.set_kill_suidgid(kill);
    op.set_sync(sync);
    return ask(r, data);
  }
  Answer truncate(InodeId id, std::uint64_t size) {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(id);
    op.set_size(size);
    return ask(r);
  }
  Answer chmod(InodeId id, std::uint32_t mode) {
    SHAREFS_ASK(SetAttr, setattr);
    op.set_id(id);
    op.set_mode(mode);
    return ask(r);
  }
  Answer fallocate(InodeId id, std::uint64_t offset, std::uint64_t length, std::uint32_t mode) {
    SHAREFS_ASK(Fallocate, fallocate);
    op.set_id(id);
    op.set_offset(offset);
    op.set_length(length);
    op.set_mode(mode);
    return ask(r);
  }
  Answer readdir(InodeId id, std::uint64_t handle, std::uint64_t offset, std::uint32_t max_bytes, bool plus) {
    SHAREFS_ASK(ReadDir, readdir);
    op.set_id(id);
    op.set_handle(handle);
    op.set_offset(offset);
    op.set_max_bytes(max_bytes);
    op.set_plus(plus);
    return ask(r);
  }

  // What the store says of an inode must be what the file system says of the path, except for the inode
  // number.
  void expect_as_stat(const pb::Attr& attr, const std::filesystem::path& file) {
    struct stat status {};
    ASSERT_EQ(::lstat(file.c_str(), &status), 0) << file;
    EXPECT_EQ(attr.mode(), status.st_mode) << file;
    EXPECT_EQ(attr.uid(), status.st_uid) << file;
    EXPECT_EQ(attr.gid(), status.st_gid) << file;
    EXPECT_EQ(attr.nlink(), status.st_nlink) << file;
    EXPECT_EQ(attr.rdev(), status.st_rdev) << file;
    EXPECT_EQ(attr.size(), static_cast<std::uint64_t>(status.st_size)) << file;
    EXPECT_EQ(attr.blocks(), static_cast<std::uint64_t>(status.st_blocks)) << file;
    EXPECT_EQ(attr.mtime(), nanoseconds(status.st_mtim)) << file;
    EXPECT_EQ(attr.ctime(), nanoseconds(status.st_ctim)) << file;
  }
  static std::int64_t nanoseconds(const timespec& time) { return time.tv_sec * 1'000'000'000 + time.tv_nsec; }

  std::string content(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  TemporaryDirectory directory_;
  Reactor reactor_;
  Workers workers_{reactor_, 1};
  OpenTable opens_;
  LockTable locks_;
  std::unique_ptr<InodeTable> inodes_;
  std::unique_ptr<Store> store_;
  std::uint32_t uid = ::geteuid(), gid = ::getegid();
  std::uint64_t handle_ = 0;
};

}  // namespace sharefs
