//! The runner of test vectors, as it is called: all files that we have, and that it notices what is wrong in them.

use anyhow::{Context, Result};
use local::parts::folder::{self, RunFolder};
use serde_json::{Value, json};
use std::{fs, path::PathBuf, process::Command};
use tests::{supervisor_binary, vectors};

fn folder() -> Result<PathBuf> {
    Ok(folder::workspace()?.join("tests/vectors"))
}

fn billing() -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&fs::read_to_string(folder()?.join("billing.json"))?)?)
}

#[test]
fn all_vectors_go_as_they_say() -> Result<()> {
    let outcome = vectors::run(&folder()?, supervisor_binary!())?;
    assert_eq!(outcome.wrong, [""; 0]);
    let mut all = 0;
    for file in fs::read_dir(folder()?)?.flatten() {
        all += serde_json::from_str::<Vec<Value>>(&fs::read_to_string(file.path())?)?.len();
    }
    assert_eq!(outcome.passed, all);
    assert!(billing()?.len() >= 48);
    Ok(())
}

#[test]
fn a_wrong_figure_an_unknown_operation_and_another_shape_are_found_in_billing() -> Result<()> {
    let run = RunFolder::create()?;
    let mut vectors = Vec::new();
    // Each operation once, with the figure that is wanted off by one; a text is another one.
    let mut seen = Vec::new();
    for mut vector in billing()? {
        let op = vector["op"].clone();
        if seen.contains(&op) {
            continue;
        }
        seen.push(op);
        vector["expected"] = off_by_one(&vector["expected"]);
        vectors.push(vector);
    }
    assert_eq!(seen.len(), 13);
    let good = billing()?.into_iter().find(|vector| vector["op"] == "prorate").context("there is no proration")?;
    for (pointer, value) in [
        ("/op", json!("guess")),
        ("/op", Value::Null),
        ("/input", json!([5000, 24, 31])),
        ("/input", json!({ "amount": 5000, "num": 24 })),
        ("/input", json!({ "amount": 5000, "num": 24, "den": 31, "mode": "up" })),
        ("/input", json!({ "amount": 5000.5, "num": 24, "den": 31 })),
        ("/input", json!({ "amount": "much", "num": 24, "den": 31 })),
        ("/input/den", json!(0)),
        ("/expected", Value::Null),
        ("/expected", json!("3871")),
    ] {
        let mut vector = good.clone();
        *vector.pointer_mut(pointer).context(pointer)? = value;
        vectors.push(vector);
    }
    let wrong = vectors.len();
    vectors.push(good);
    fs::write(run.path().join("billing.json"), serde_json::to_vec(&vectors)?)?;
    let outcome = vectors::run(run.path(), supervisor_binary!())?;
    assert_eq!((outcome.passed, outcome.wrong.len()), (1, wrong), "{:#?}", outcome.wrong);
    assert!(!outcome.is_good());
    Ok(())
}

fn off_by_one(expected: &Value) -> Value {
    match expected {
        Value::Number(number) => json!(number.as_i64().unwrap_or_default() + 1),
        Value::Array(items) => {
            let mut items = items.clone();
            items[0] = off_by_one(&items[0]);
            Value::Array(items)
        }
        Value::Object(fields) => {
            let mut fields = fields.clone();
            if let Some(last) = fields.values_mut().last() {
                *last = off_by_one(last);
            }
            Value::Object(fields)
        }
        other => json!(format!("{}0", other.as_str().unwrap_or_default())),
    }
}

/// The program by itself, which has to own its database: with a copy in which one figure is another.
#[test]
fn the_program_fails_on_one_figure_that_is_wrong() -> Result<()> {
    let run = RunFolder::create()?;
    let mut vectors = billing()?;
    let program = || -> Result<(bool, String)> {
        let output = Command::new(env!("CARGO_BIN_EXE_vectors")).arg(run.path()).output()?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    fs::write(run.path().join("billing.json"), serde_json::to_vec(&vectors)?)?;
    let (passed, said) = program()?;
    assert!(passed && said.ends_with(&format!("{} passed, 0 failed\n", vectors.len())), "{said}");
    vectors[0]["expected"]["volume"] = json!(701);
    fs::write(run.path().join("billing.json"), serde_json::to_vec(&vectors)?)?;
    let (passed, said) = program()?;
    assert!(!passed && said.ends_with(&format!("{} passed, 1 failed\n", vectors.len() - 1)), "{said}");
    Ok(())
}
