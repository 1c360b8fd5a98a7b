#include "written_pages.h"

#include <cerrno>
#include <cstdio>
#include <system_error>

#if defined(__linux__)
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>
#endif

namespace sbert_fast::host {

#if defined(__linux__) && defined(SYS_userfaultfd) && defined(UFFDIO_WRITEPROTECT) && \
    defined(MADV_WIPEONFORK)
namespace {

// Of Linux 6.7; older headers lack them. Faults of user code alone need no privilege.
constexpr int kUserModeOnly = 1;
constexpr uint64_t kUnpopulated = 1 << 13, kAsync = 1 << 15;
constexpr uint64_t kProtectMatching = 1, kCheckProtected = 2, kIsWritten = 2;
struct Scan {
  uint64_t size, flags, start, end, walk_end, regions, num_regions, max_pages;
  uint64_t inverted, mask, any_of, returned;
};
struct Region {
  uint64_t start, end, categories;
};
const unsigned long kPagemapScan = _IOWR('f', 16, Scan);

[[noreturn]] void fail(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Whether Linux is 6.9 or later: those before may take swapped pages for pages not written to.
bool is_recent() {
  utsname name{};
  int major = 0, minor = 0;
  return uname(&name) == 0 && std::sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
         (major > 6 || (major == 6 && minor >= 9));
}

// What a process watches its pages with. A child that was forked has neither the protection nor,
// at these descriptors, its own pages.
struct Watch {
  // A page that is zero in a child: two processes may have the same number.
  char* here = nullptr;
  bool is_refused = false;
  int faults = -1, pagemap = -1;

  bool is_of_this_process() const { return here != nullptr && *here != 0; }

  void open() {
    if (here == nullptr) {
      void* page = mmap(nullptr, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (page == MAP_FAILED) fail("mmap");
      here = static_cast<char*>(page);
      if (madvise(here, static_cast<size_t>(sysconf(_SC_PAGESIZE)), MADV_WIPEONFORK) != 0) {
        is_refused = true;
      }
    }
    errno = ENOSYS;
    if (is_refused || !is_recent()) fail("userfaultfd");
    // Those of a parent are not closed: by now other files may have the numbers.
    const int opened =
        static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | kUserModeOnly));
    uffdio_api api{};
    api.api = UFFD_API;
    api.features = kUnpopulated | kAsync;
    const bool is_served = opened >= 0 && ioctl(opened, UFFDIO_API, &api) == 0;
    const int pages = is_served ? ::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC) : -1;
    if (pages < 0) {
      const int reason = errno;
      is_refused = reason != EMFILE && reason != ENFILE;
      if (opened >= 0) ::close(opened);
      errno = reason;
      fail("userfaultfd");
    }
    faults = opened, pagemap = pages;
    *here = 1;
  }

  // How many regions were written to, up to `limit`; the scan goes on at `start`. Negative where it
  // fails.
  int scan(uint64_t& start, uint64_t end, uint64_t flags, Region* regions, uint64_t limit) const {
    Scan scan{};
    scan.size = sizeof(scan);
    scan.flags = flags;
    scan.start = start;
    scan.end = end;
    scan.regions = reinterpret_cast<uint64_t>(regions);
    scan.num_regions = limit;
    scan.mask = scan.returned = kIsWritten;
    const int found = ioctl(pagemap, kPagemapScan, &scan);
    start = scan.walk_end;
    return found;
  }
};

Watch watch;

}  // namespace

std::vector<Pages> watch_pages(const std::vector<Pages>& pages) {
  if (!watch.is_of_this_process()) watch.open();
  std::vector<Pages> written;
  Region regions[256];
  for (auto [start, end] : pages) {
    uffdio_register range{};
    range.range = {start, end - start};
    range.mode = UFFDIO_REGISTER_MODE_WP;
    if (ioctl(watch.faults, UFFDIO_REGISTER, &range) != 0) fail("UFFDIO_REGISTER");
    while (start < end) {
      const int found = watch.scan(start, end, kProtectMatching | kCheckProtected, regions, 256);
      if (found < 0) fail("PAGEMAP_SCAN");
      for (int i = 0; i < found; ++i) written.emplace_back(regions[i].start, regions[i].end);
    }
  }
  return written;
}

bool are_pages_written(const std::vector<Pages>& pages) {
  if (!watch.is_of_this_process()) {
    errno = EPERM;
    fail("pages of another process");
  }
  Region region;
  for (auto [start, end] : pages) {
    if (watch.scan(start, end, kCheckProtected, &region, 1) != 0) return true;
  }
  return false;
}
#else
std::vector<Pages> watch_pages(const std::vector<Pages>&) {
  throw std::system_error(ENOSYS, std::generic_category(), "userfaultfd");
}

bool are_pages_written(const std::vector<Pages>&) {
  throw std::system_error(ENOSYS, std::generic_category(), "userfaultfd");
}
#endif

}  // namespace sbert_fast::host
