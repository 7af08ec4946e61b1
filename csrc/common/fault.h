// Faults as data. Nothing in the core traps, aborts or exits: a wait that ends badly throws one of these, and the
// binding turns it into a typed Python error.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ray_deepep {

enum class Operation : int32_t {
    kNone = 0,
    kDispatch = 1,
    kCombine = 2,
    kCombineWeights = 3,
    kAllocate = 4,
    kLowLatencyDispatch = 5,
    kLowLatencyCombine = 6
};
enum class Cause : int32_t { kNone = 0, kTimeout = 1, kPeerDied = 2, kPeerClosed = 3, kAborted = 4 };

const char* to_string(Operation operation);
const char* to_string(Cause cause);

// What waited, for whom, and what was seen. `peer` is the rank to blame, which need not be the one waited for.
struct FaultRecord {
    Operation operation = Operation::kNone;
    uint32_t sequence = 0;
    std::string phase;
    Cause cause = Cause::kNone;
    int rank = -1;
    int peer = -1;
    uint32_t expected = 0;
    uint32_t seen = 0;
    double elapsed_s = 0;
    double deadline_s = 0;
};

// The first fault of a buffer, for a thread that looks while another one waits in an operation.
class FaultSlot {
  public:
    void set(const FaultRecord& record) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!record_) record_ = record;
    }
    std::optional<FaultRecord> get() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        return record_;
    }

  private:
    mutable std::mutex mutex_;
    std::optional<FaultRecord> record_;
};

class FaultError : public std::runtime_error {
  public:
    explicit FaultError(FaultRecord record) : std::runtime_error(record.phase), record_(std::move(record)) {}
    const FaultRecord& record() const { return record_; }

  private:
    FaultRecord record_;
};

// Ranks that did not come to a bootstrap step in time.
class BootstrapError : public std::runtime_error {
  public:
    BootstrapError(std::string phase, std::vector<int> missing, double deadline_s, std::string detail)
        : std::runtime_error(detail), phase_(std::move(phase)), missing_(std::move(missing)), deadline_s_(deadline_s) {}
    const std::string& phase() const { return phase_; }
    const std::vector<int>& missing() const { return missing_; }
    double deadline_s() const { return deadline_s_; }

  private:
    std::string phase_;
    std::vector<int> missing_;
    double deadline_s_;
};

// Ranks called one collective with arguments that do not fit each other.
class MismatchError : public std::runtime_error {
  public:
    // `expected` is what rank `first` passed.
    MismatchError(Operation operation, int peer, std::string field, std::string expected, std::string seen,
                  int first = 0)
        : std::runtime_error(field),
          operation_(operation),
          peer_(peer),
          first_(first),
          field_(std::move(field)),
          expected_(std::move(expected)),
          seen_(std::move(seen)) {}
    Operation operation() const { return operation_; }
    int peer() const { return peer_; }
    int first() const { return first_; }
    const std::string& field() const { return field_; }
    const std::string& expected() const { return expected_; }
    const std::string& seen() const { return seen_; }

  private:
    Operation operation_;
    int peer_, first_;
    std::string field_, expected_, seen_;
};

// Peers went on without this rank: they had masked it. Nothing that this rank does reaches them until it rejoins.
class MaskedError : public std::runtime_error {
  public:
    MaskedError(Operation operation, std::vector<int> by)
        : std::runtime_error(to_string(operation)), operation_(operation), by_(std::move(by)) {}
    Operation operation() const { return operation_; }
    const std::vector<int>& by() const { return by_; }

  private:
    Operation operation_;
    std::vector<int> by_;
};

// A value that breaks a rule which only the core can check; raised before anything is published.
class ArgumentError : public std::runtime_error {
  public:
    ArgumentError(std::string argument, std::string value, std::string rule)
        : std::runtime_error(rule), argument_(std::move(argument)), value_(std::move(value)) {}
    const std::string& argument() const { return argument_; }
    const std::string& value() const { return value_; }

  private:
    std::string argument_, value_;
};

}  // namespace ray_deepep
