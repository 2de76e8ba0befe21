//! The Test Anything Protocol, as pgTAP writes it.

use std::fmt;

/// What one file of tests said.
#[derive(Debug, Default)]
pub struct Report {
    /// How many it meant to run.
    pub planned: Option<usize>,
    /// How many it ran.
    pub ran: usize,
    /// Those that failed, each with what was said of it. One marked `TODO` is no failure.
    pub failures: Vec<String>,
    /// What was said besides.
    pub notes: Vec<String>,
    /// What ended it before its end.
    pub stopped: Option<String>,
}

impl Report {
    /// Takes in what a statement returned; a value may have several lines.
    pub fn read(&mut self, text: &str) {
        for line in text.lines() {
            self.read_line(line);
        }
    }

    fn read_line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("not ok ") {
            self.ran += 1;
            if !rest.contains("# TODO") {
                self.failures.push(rest.to_owned());
            }
        } else if line.starts_with("ok ") {
            self.ran += 1;
        } else if let Some(note) = line.strip_prefix('#') {
            match self.failures.last_mut() {
                // pgTAP explains a failure in the lines behind it.
                Some(failure) => {
                    failure.push_str("\n      ");
                    failure.push_str(note);
                }
                None => self.notes.push(note.trim().to_owned()),
            }
        } else if let Some(planned) = line.strip_prefix("1..").and_then(|number| number.parse().ok()) {
            self.planned = Some(planned);
        }
    }

    /// Whether it ran what it meant to, something at least, and all of it passed.
    pub fn passed(&self) -> bool {
        self.stopped.is_none() && self.failures.is_empty() && self.ran > 0 && self.planned == Some(self.ran)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let planned = self.planned.map_or_else(|| "no plan".to_owned(), |planned| format!("{planned} planned"));
        writeln!(formatter, "{planned}, {} ran, {} failed", self.ran, self.failures.len())?;
        for failure in &self.failures {
            writeln!(formatter, "  not ok {failure}")?;
        }
        if let Some(stopped) = &self.stopped {
            writeln!(formatter, "  stopped: {stopped}")?;
        }
        for note in &self.notes {
            writeln!(formatter, "  # {note}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(text: &str) -> Report {
        let mut report = Report::default();
        report.read(text);
        report
    }

    #[test]
    fn what_was_planned_and_ran_passes() {
        assert!(report("1..2\nok 1 - a\nok 2 - b").passed());
        assert!(report("ok 1 - a\n1..1").passed(), "a plan may come last");
        assert!(report("1..1\nnot ok 1 - a # TODO later").passed());
    }

    #[test]
    fn a_file_that_runs_nothing_or_stops_early_fails() {
        for text in ["", "1..0", "1..2\nok 1 - a", "ok 1 - a", "1..1\nok 1 - a\nok 2 - b"] {
            assert!(!report(text).passed(), "{text}");
        }
    }

    #[test]
    fn a_failure_is_told_with_its_diagnostics() {
        let report =
            report("1..1\nnot ok 1 - adds up\n# Failed test 1: \"adds up\"\n#         have: 3\n#         want: 4");
        assert!(!report.passed());
        assert!(report.to_string().contains("have: 3"), "{report}");
    }
}
