//! What a person sees while things start: one line a step, moving on a terminal, plain lines elsewhere.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::{IsTerminal, Write},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Width of the column with the steps' names.
const NAME_WIDTH: usize = 16;
/// How often a step says again, where nothing can move, that it is still at work.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Moving,
    Plain,
    Silent,
}

/// Where steps are shown. All goes to standard error; standard output is for results.
#[derive(Debug, Clone)]
pub struct Progress {
    bars: MultiProgress,
    mode: Mode,
}

impl Progress {
    /// Moving lines when standard error is a terminal, else plain ones.
    pub fn visible() -> Self {
        if std::io::stderr().is_terminal() {
            Self { bars: MultiProgress::new(), mode: Mode::Moving }
        } else {
            Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), mode: Mode::Plain }
        }
    }

    /// Shows nothing; for tests.
    pub fn hidden() -> Self {
        Self { bars: MultiProgress::with_draw_target(ProgressDrawTarget::hidden()), mode: Mode::Silent }
    }

    /// Whether lines move, that is whether standard error is a terminal.
    pub fn is_moving(&self) -> bool {
        self.mode == Mode::Moving
    }

    /// The bars below, for displays of their own.
    pub fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Writes a line above the moving ones.
    pub fn print(&self, line: &str) {
        match self.mode {
            Mode::Moving => drop(self.bars.println(line)),
            Mode::Plain => plain(line),
            Mode::Silent => {}
        }
    }

    /// Begins a step.
    pub fn step(&self, name: &str) -> Step {
        let bar = self.bars.add(ProgressBar::new_spinner());
        bar.set_style(style(&format!("  {{spinner:.cyan}} {{prefix:<{NAME_WIDTH}}} {{wide_msg}}")));
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(80));
        let state = State { started: Instant::now(), said: None, counts_bytes: false, finished: false };
        Step { bar, name: name.to_owned(), mode: self.mode, state: Arc::new(Mutex::new(state)) }
    }
}

#[derive(Debug)]
struct State {
    started: Instant,
    said: Option<Instant>,
    counts_bytes: bool,
    finished: bool,
}

/// One step under way. A step that is dropped before it is done shows as failed.
#[derive(Debug)]
pub struct Step {
    bar: ProgressBar,
    name: String,
    mode: Mode,
    state: Arc<Mutex<State>>,
}

impl Step {
    /// What the step is doing now.
    pub fn say(&self, text: impl Into<String>) {
        let text = text.into();
        self.plain_at_times(&text);
        self.bar.set_message(text);
    }

    /// Turns the line into a bar over `length` things.
    pub fn set_length(&self, length: u64) {
        self.bar.set_length(length);
        self.bar.set_style(style(&format!(
            "  {{spinner:.cyan}} {{prefix:<{NAME_WIDTH}}} {{bar:32.cyan/dim}} {{pos:>4}}/{{len}}  {{wide_msg}}"
        )));
    }

    /// Turns the line into a bar over about `bytes` bytes.
    pub fn set_bytes(&self, bytes: u64) {
        self.state().counts_bytes = true;
        self.bar.set_length(bytes);
        self.bar.set_style(style(&format!(
            "  {{spinner:.cyan}} {{prefix:<{NAME_WIDTH}}} {{bar:32.cyan/dim}} {{bytes:>10}} of {{total_bytes}}  {{wide_msg}}"
        )));
    }

    /// How far the bar is; never past its end.
    pub fn set_position(&self, position: u64) {
        let length = self.bar.length().unwrap_or(u64::MAX);
        let position = position.min(length);
        self.bar.set_position(position);
        if self.mode == Mode::Plain {
            let counts_bytes = self.state().counts_bytes;
            let (done, of, unit) =
                if counts_bytes { (position >> 20, length >> 20, " MB") } else { (position, length, "") };
            self.plain_at_times(&format!("{done} of {of}{unit}"));
        }
    }

    /// Ends the step well, with what came of it and how long it took.
    pub fn done(self, result: impl AsRef<str>) {
        let took = self.elapsed();
        self.finish("✓", &format!("{}  ({:.1} s)", result.as_ref(), took.as_secs_f64()));
    }

    /// Ends the step well and takes its line away: nothing had to be done.
    pub fn vanish(self) {
        self.state().finished = true;
        self.bar.finish_and_clear();
    }

    /// Since the step began.
    pub fn elapsed(&self) -> Duration {
        self.state().started.elapsed()
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn plain_at_times(&self, text: &str) {
        if self.mode != Mode::Plain {
            return;
        }
        let mut state = self.state();
        let since = state.said.unwrap_or(state.started).elapsed();
        if since >= PLAIN_INTERVAL {
            state.said = Some(Instant::now());
            plain(&format!("  … {:<NAME_WIDTH$} {text}", self.name));
        }
    }

    fn finish(&self, mark: &str, text: &str) {
        self.state().finished = true;
        let line = format!("  {mark} {:<NAME_WIDTH$} {text}", self.name);
        match self.mode {
            Mode::Moving => {
                self.bar.set_style(style("{wide_msg}"));
                self.bar.finish_with_message(line);
            }
            Mode::Plain => {
                self.bar.finish_and_clear();
                plain(&line);
            }
            Mode::Silent => self.bar.finish_and_clear(),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let finished = self.state().finished;
        if !finished {
            self.finish("✗", "did not finish");
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file: one that does not parse shows as a plain bar.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ ")
        .progress_chars("━━╌")
}

fn plain(line: &str) {
    // Nobody is left to be told when standard error is closed.
    let _closed = writeln!(std::io::stderr(), "{line}");
}
