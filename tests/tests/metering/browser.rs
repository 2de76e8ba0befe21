//! The page of usage in a browser: what it looks like is decided there and nowhere else.

use anyhow::{Context, Result};
use local::parts::folder::RunFolder;
use serde::Deserialize;
use std::{fs, time::Duration};
use tests::required;
use tokio::{process::Command, time::timeout};

/// A phone, and a screen.
const WIDTHS: [u32; 2] = [360, 1_200];
const PATIENCE: Duration = Duration::from_secs(60);

/// What the browser made of it, at one width.
#[derive(Debug, Deserialize)]
struct Seen {
    width: u32,
    /// As wide as what is in it.
    needed: u32,
    /// Of each card: its left and right end, and the height of its chart.
    cards: Vec<(f64, f64, f64)>,
    /// How many stand beside the first.
    beside: usize,
    /// Of the smallest text that is drawn, the height of a line.
    smallest: f64,
    ink: String,
    ground: String,
}

/// Shows the page at each width and writes down what it finds, as the only text of a document.
fn measuring(page: &str) -> String {
    let frames: String = WIDTHS
        .iter()
        .map(|width| format!("<iframe id=\"w{width}\" style=\"width:{width}px;height:4000px;border:0\"></iframe>"))
        .collect();
    // A text inside a script ends with it, so that no `<` of the page may stand there as it is.
    let page = serde_json::to_string(page).unwrap_or_default().replace('<', "\\u003c");
    format!(
        "<!doctype html><meta charset=\"utf-8\"><body>{frames}<script>
        const page = {page}, seen = [];
        const frames = [...document.querySelectorAll('iframe')];
        let waiting = frames.length;
        for (const frame of frames) {{
          frame.onload = () => {{
            const inner = frame.contentDocument, root = inner.documentElement;
            const box = element => element.getBoundingClientRect();
            const cards = [...inner.querySelectorAll('section')];
            seen.push({{
              width: root.clientWidth,
              needed: root.scrollWidth,
              cards: cards.map(card => [box(card).left, box(card).right, card.querySelector('svg') ? box(card.querySelector('svg')).height : 0]),
              beside: cards.filter(card => box(card).top === box(cards[0]).top).length,
              smallest: Math.min(...[...inner.querySelectorAll('svg text')].map(text => box(text).height)),
              ink: getComputedStyle(inner.body).color,
              ground: getComputedStyle(inner.body).backgroundColor,
            }});
            if (--waiting === 0) document.body.textContent = 'SEEN ' + JSON.stringify(seen) + ' SEEN';
          }};
          frame.srcdoc = page;
        }}
        </script>"
    )
}

/// Fails unless nothing of the page is cut off or unreadably small, on a phone and on a screen.
pub async fn assert_fits(page: &str) -> Result<()> {
    let mut browser = None;
    for name in ["chromium", "chromium-browser", "google-chrome"] {
        if Command::new(name).arg("--version").output().await.is_ok_and(|output| output.status.success()) {
            browser = Some(name);
            break;
        }
    }
    let Some(browser) = browser else {
        return required::missing("Chromium", "Install chromium, to see the page of usage as users do.");
    };
    let run = RunFolder::create()?;
    let file = run.path().join("page.html");
    fs::write(&file, measuring(page))?;
    let shown = Command::new(browser)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--window-size=1400,1000",
            "--dump-dom",
        ])
        .arg(format!("--user-data-dir={}", run.path().join("profile").display()))
        .arg(format!("file://{}", file.display()))
        .kill_on_drop(true)
        .output();
    let shown = timeout(PATIENCE, shown).await.context("the browser shows nothing")??;
    let text = String::from_utf8_lossy(&shown.stdout);
    let found = text.split("SEEN ").nth(1).and_then(|rest| rest.split(" SEEN").next());
    let found = found.with_context(|| format!("{text}\n{}", String::from_utf8_lossy(&shown.stderr)))?;
    let mut seen: Vec<Seen> = serde_json::from_str(&found.replace("&quot;", "\""))?;
    seen.sort_by_key(|seen| seen.width);
    println!("{seen:#?}");
    assert_eq!(seen.iter().map(|seen| seen.width).collect::<Vec<_>>(), WIDTHS);
    for seen in &seen {
        assert!(seen.needed <= seen.width, "something is cut off at {}: {}", seen.width, seen.needed);
        assert!(seen.cards.len() > 2 && seen.cards.iter().any(|card| card.2 > 100.0), "a chart is there to be seen");
        assert!(seen.cards.iter().all(|card| card.0 >= 0.0 && card.1 <= f64::from(seen.width)));
        assert!(seen.smallest > 9.0, "a text of {} is too small", seen.smallest);
        assert_ne!(seen.ink, seen.ground);
    }
    assert_eq!((seen[0].beside, seen[1].beside > 1), (1, true), "one column on a phone, more on a screen");
    Ok(())
}
