//! The rate of the time-stamp counter, which an emulated guest must be told.
//!
//! Emulation hands the host's counter through to the guest, whose kernel measures it against an emulated timer. On a busy
//! host that measurement fails now and then, and then the kernel waits for ticks of a timer that a machine with ACPI and
//! without a PIT interrupt never gets: one start in seven hung for ever. Told the rate, it measures nothing.

use std::time::{Duration, Instant};

use crate::accelerator::Accelerator;

/// Two readings this far apart give the rate to some tens of parts in a million.
const SPAN: Duration = Duration::from_millis(5);

/// Two clocks read within this time were read at once, as far as the rate is concerned.
const AT_ONCE: Duration = Duration::from_micros(20);
/// How often they are read until they were.
const READINGS: usize = 50;

/// What a guest is told about its clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clock {
    /// The counter's rate.
    pub khz: u64,
    /// It runs at that rate whatever the processor does, the same on each.
    pub invariant: bool,
}

/// A first reading, taken while other things are prepared.
pub(super) struct Measurement(Reading);

/// Both clocks at one instant.
#[derive(Clone, Copy)]
struct Reading {
    time: Instant,
    counter: u64,
}

impl Reading {
    /// Reads both clocks; again if this process was held up in between, which would make the rate a matter of luck.
    fn take() -> Self {
        let mut best = Duration::MAX;
        let mut reading = Self { time: Instant::now(), counter: counter() };
        for _ in 0..READINGS {
            let (before, counter, after) = (Instant::now(), counter(), Instant::now());
            let apart = after - before;
            if apart < best {
                best = apart;
                reading = Self { time: before + apart / 2, counter };
            }
            if apart < AT_ONCE {
                break;
            }
        }
        reading
    }
}

impl Measurement {
    pub(super) fn begin() -> Self {
        Self(Reading::take())
    }

    /// The second reading. `None` with hardware virtualisation, where the guest has a paravirtual clock.
    pub(super) async fn finish(self, accelerator: Accelerator) -> Option<Clock> {
        if accelerator == Accelerator::Kvm {
            return None;
        }
        let first = self.0;
        tokio::time::sleep(SPAN.saturating_sub(first.time.elapsed())).await;
        let second = Reading::take();
        let ticks = second.counter.wrapping_sub(first.counter);
        let nanoseconds = (second.time - first.time).as_nanos();
        let khz = u64::try_from(u128::from(ticks) * 1_000_000 / nanoseconds.max(1)).ok()?;
        Some(Clock { khz, invariant: is_invariant() }).filter(|clock| clock.khz > 0)
    }
}

#[allow(unsafe_code)]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it unless they ask otherwise.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn is_invariant() -> bool {
    let text = crate::atomic::read(std::path::Path::new("/proc/cpuinfo"), 16 << 20).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let flags = text.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    ["constant_tsc", "nonstop_tsc"]
        .iter()
        .all(|flag| flags.split_ascii_whitespace().any(|word| word == *flag))
}
