//! `cargo run -p tests --bin vectors -- DIR`: every vector of the JSON files in DIR, through the code that the handlers use.
//!
//! A line for each one that goes wrong, then `N passed, M failed`. Fails on any of them, on an empty folder, and on a file or shape that
//! it does not know. For `billing.json` it starts a database, whose owner is this program once more.

use std::{env, path::PathBuf, process::ExitCode};
use tests::{supervisor, vectors};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let (Some(folder), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        eprintln!("usage: vectors DIR");
        return ExitCode::from(2);
    };
    let program = match env::current_exe() {
        Ok(program) => program,
        Err(error) => {
            eprintln!("where this program is cannot be found out: {error}");
            return ExitCode::FAILURE;
        }
    };
    if folder == program {
        return match supervisor::serve(&program) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:#}");
                ExitCode::FAILURE
            }
        };
    }
    match vectors::run(&folder, &program) {
        Ok(outcome) => {
            outcome.wrong.iter().for_each(|line| println!("{line}"));
            println!("{} passed, {} failed", outcome.passed, outcome.wrong.len());
            if outcome.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("{error:#}");
            println!("0 passed, 1 failed");
            ExitCode::FAILURE
        }
    }
}
