use local::{parts::progress::Progress, stack::*, welcome::Welcome};
use std::time::{Duration, Instant};
#[tokio::test(flavor = "multi_thread")]
async fn up() {
    let t = Instant::now();
    let binaries = Some(std::path::PathBuf::from("/tmp/infra/bins"));
    let stack = Stack::start(StackOptions { binaries, progress: Progress::visible(), ..Default::default() }).await.unwrap();
    println!("up {:?}", t.elapsed());
    stack.open_for_calls().await.unwrap();
    let w = Welcome::prepare(&stack, None).await.unwrap();
    println!("welcome {:?}", t.elapsed());
    println!("{}\n{}", w.json(&stack), w.text(&stack));
    tokio::time::sleep(Duration::from_secs(std::env::var("KEEP").map_or(1, |k| k.parse().unwrap()))).await;
    let t = Instant::now();
    w.stop().await;
    stack.stop().await.unwrap();
    println!("down {:?}", t.elapsed());
}
