//! The page of errors lists every code that is raised, and none that is not.

use anyhow::{Context, Result, ensure};
use local::{parts::folder, schema};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// The codes that a text of statements raises, with their status.
fn raised_in_sql(sql: &str) -> Vec<(String, String)> {
    let mut raised = Vec::new();
    for (before, call) in sql.match_indices("raise_error(").map(|(at, call)| sql.split_at(at + call.len())) {
        let Some((status, rest)) = call.trim_start().split_once(',') else { continue };
        if status.len() != 3 || !status.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let rest = rest.trim_start();
        let code = match rest.strip_prefix('\'') {
            Some(rest) => rest.split('\'').next(),
            // Named by the comparison just before: `if obstacle = 'x' then`.
            None => before.rsplit('\'').nth(1),
        };
        raised.push((status.to_owned(), code.unwrap_or_default().to_owned()));
    }
    // What is said of one lead among others, or raised with more beside it.
    raised.extend(
        sql.split("'code', '")
            .skip(1)
            .filter_map(|rest| rest.split('\'').next())
            .map(|code| (String::new(), code.to_owned())),
    );
    // What is said of one usage event among others.
    for part in sql.split("case result.code").skip(1) {
        let said = part.split("end").next().unwrap_or_default();
        raised.extend(
            said.split("when '")
                .skip(1)
                .filter_map(|when| when.split('\'').next())
                .map(|code| ("422".to_owned(), code.to_owned())),
        );
    }
    raised
}

/// The codes that a Rust source makes, with their status where it stands beside them.
fn raised_in_rust(path: &Path, source: &str) -> Vec<(String, String)> {
    let source = source.split("#[cfg(test)]").next().unwrap_or_default();
    let mut raised = Vec::new();
    let literal = |text: &str| {
        let code = text.trim_start().strip_prefix('"')?.split('"').next()?;
        code.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            .then(|| code.to_owned())
    };
    for call in source.split("::new(").skip(1) {
        let Some(rest) = call.trim_start().strip_prefix("StatusCode::") else { continue };
        let Some((status, rest)) = rest.split_once(',') else { continue };
        if let Some(code) = literal(rest) {
            raised.push((status_number(status).to_owned(), code));
        }
    }
    // Where PostgREST's own answers are told apart, a code is an arm of a match.
    let arms: &[&str] = if path.ends_with("shared/src/error.rs") {
        &["\") => \"", "c.starts_with(\"PGRST3\") => \"", "(_, \"\") => \""]
    } else {
        &[]
    };
    for start in arms.iter().chain(&["error.code = \"", "outcome.code.unwrap_or_else(|| \""]) {
        for rest in source.split(*start).skip(1) {
            raised.extend(literal(&format!("\"{rest}")).map(|code| (String::new(), code)));
        }
    }
    raised
}

fn status_number(name: &str) -> &'static str {
    match name {
        "BAD_REQUEST" => "400",
        "UNAUTHORIZED" => "401",
        "PAYMENT_REQUIRED" => "402",
        "FORBIDDEN" => "403",
        "NOT_FOUND" => "404",
        "METHOD_NOT_ALLOWED" => "405",
        "CONFLICT" => "409",
        "PAYLOAD_TOO_LARGE" => "413",
        "UNPROCESSABLE_ENTITY" => "422",
        "TOO_MANY_REQUESTS" => "429",
        "INTERNAL_SERVER_ERROR" => "500",
        "BAD_GATEWAY" => "502",
        "SERVICE_UNAVAILABLE" => "503",
        _ => "an unknown status",
    }
}

/// Every Rust file below a folder's `src`.
fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())?.flatten() {
            let path = entry.path();
            if path.is_dir() {
                if !matches!(path.file_name().and_then(|name| name.to_str()), Some("tests" | "target")) {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    Ok(found)
}

#[test]
fn the_page_of_errors_lists_every_code_that_is_raised_and_no_other() -> Result<()> {
    let workspace = folder::workspace()?;
    let mut raised: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut note = |found: Vec<(String, String)>| {
        for (status, code) in found {
            let statuses = raised.entry(code).or_default();
            if !status.is_empty() {
                statuses.insert(status);
            }
        }
    };
    for file in schema::files()? {
        note(raised_in_sql(&file.sql));
    }
    for folder in ["functions", "shared"] {
        for path in sources(&workspace.join(folder))? {
            note(raised_in_rust(&path, &fs::read_to_string(&path)?));
        }
    }
    ensure!(raised.len() > 60, "only {} codes were found: {raised:?}", raised.len());

    let page = fs::read_to_string(workspace.join("docs/errors.md"))?;
    let mut listed: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
        let mut cells = line.split('|').skip(1).map(str::trim);
        let (status, codes) = (cells.next().unwrap_or_default(), cells.next().unwrap_or_default());
        for code in codes.split('`').skip(1).step_by(2) {
            listed.entry(code.to_owned()).or_default().insert(status.to_owned());
        }
    }
    let missing: Vec<String> = raised
        .iter()
        .filter(|(code, statuses)| listed.get(*code).is_none_or(|known| !statuses.is_subset(known)))
        .map(|(code, statuses)| {
            format!("| {} | `{code}` |", Vec::from_iter(statuses.iter().map(String::as_str)).join(" "))
        })
        .collect();
    let unknown: Vec<&String> = listed.keys().filter(|code| !raised.contains_key(*code)).collect();
    assert!(missing.is_empty(), "docs/errors.md does not list:\n{}", missing.join("\n"));
    assert!(unknown.is_empty(), "docs/errors.md lists what nothing raises: {unknown:?}");
    Ok(())
}
