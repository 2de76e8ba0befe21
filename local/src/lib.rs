//! The whole system on one machine, without Docker and without a cloud account: the real parts it runs on, a simulated phone carrier,
//! and a story that plays through them.
//!
//! [`parts`] are usable one by one, as tests do; [`stack`] starts all of them in order; the binaries `up` and `demo` are thin.

pub mod carrier;
pub mod operate;
pub mod parts;
pub mod schema;
pub mod shutdown;
pub mod stack;
pub mod story;
pub mod welcome;

/// The command line. `cargo demo -- --json` reaches the program as `-- --json`, since the alias ends with the dashes that cargo wants:
/// the first `--` is dropped, so that the options are read as such, with and without it.
pub fn arguments() -> impl Iterator<Item = std::ffi::OsString> {
    let mut arguments: Vec<_> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == "--") {
        arguments.remove(1);
    }
    arguments.into_iter()
}
