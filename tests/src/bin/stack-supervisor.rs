//! Owns the servers that the test processes of one run share; started by the first of them.

use std::{env, path::PathBuf, process::ExitCode};

fn main() -> ExitCode {
    let Some(binary) = env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("this program is started by the tests themselves");
        return ExitCode::FAILURE;
    };
    match tests::supervisor::serve(&binary) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
