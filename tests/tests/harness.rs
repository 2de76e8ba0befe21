//! The stand that all other tests rely on.

use anyhow::{Context, Result};
use local::parts::{folder::RunFolder, postgres::Role};
use std::{fs, path::PathBuf, time::Duration};
use tests::{
    Database, Fingerprint, Stack,
    programs::{Program, all_gone, family, names},
    scene, supervisor_binary,
};

#[tokio::test]
async fn a_database_is_the_test_s_own() -> Result<()> {
    let (one, other) =
        (Database::migrated(supervisor_binary!()).await?, Database::migrated(supervisor_binary!()).await?);
    let (one, other) = (one.connect(Role::Owner).await?, other.connect(Role::Owner).await?);
    let before = Fingerprint::of(&other).await?;
    one.batch_execute("insert into private.clock_offset (shift) values ('1 day')").await?;
    before.assert_same(&Fingerprint::of(&other).await?);
    let changed = before.changed(&Fingerprint::of(&one).await?);
    assert_eq!(changed.into_iter().collect::<Vec<_>>(), ["private.clock_offset"]);
    Ok(())
}

#[tokio::test]
async fn a_database_ends_with_its_test() -> Result<()> {
    let witness = Database::bare(supervisor_binary!()).await?;
    let client = witness.connect(Role::Admin).await?;
    let gone = Database::bare(supervisor_binary!()).await?;
    let (name, folder) = (gone.name.clone(), gone.attached.folder.clone());
    assert!(folder.is_dir());
    let _still_connected = gone.connect(Role::Owner).await?;
    drop(gone);
    for _ in 0..200 {
        if client.query("select from pg_database where datname = $1", &[&name]).await?.is_empty() && !folder.exists() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{name} or {} is still there", folder.display());
}

#[tokio::test]
async fn a_stack_plays_a_campaign_up_to_its_calls() -> Result<()> {
    let stack = Stack::start(supervisor_binary!()).await?;
    let campaign = scene::running_campaign(&stack, &scene::phones(1, 3)).await?;
    let calls = campaign.dial(&stack).await?;
    let mut callees: Vec<String> = calls.into_iter().map(|call| call.to).collect();
    callees.sort();
    assert_eq!(callees, scene::phones(1, 3));
    Ok(())
}

/// Where the supervisor of a run that is to be killed is.
const OTHER_SUPERVISOR: &str = "TRUNKLINE_TEST_SUPERVISOR";

#[tokio::test]
#[ignore = "is one half of a_run_that_is_killed_leaves_no_process, which starts it"]
async fn a_test_that_never_ends() -> Result<()> {
    let supervisor = PathBuf::from(std::env::var_os(OTHER_SUPERVISOR).context("not started by the other half")?);
    let _stack = Stack::start(&supervisor).await?;
    eprintln!("it runs");
    std::future::pending().await
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_run_that_is_killed_leaves_no_process() -> Result<()> {
    let folder = RunFolder::create()?;
    // A supervisor of its own: that of this run has other tests to serve.
    let supervisor = folder.path().join("stack-supervisor");
    fs::copy(supervisor_binary!(), &supervisor)?;
    let tests = std::env::current_exe()?;
    // A shell in place of cargo: the parent of the tests.
    let script = format!(
        "{OTHER_SUPERVISOR}={} {} --exact a_test_that_never_ends --ignored --nocapture & wait",
        supervisor.display(),
        tests.display()
    );
    let mut run = Program::start(&PathBuf::from("/bin/sh"), &["-c", &script], folder.path()).await?;
    run.has_said("it runs", Duration::from_secs(60)).await?;
    let family = family(run.id());
    let names = names(&family);
    // The kernel keeps fifteen letters of a name.
    for part in ["harness", "stack-superviso", "postgres", "postgrest", "python3"] {
        assert!(names.iter().any(|name| name.starts_with(part)), "{part} in {names:?}");
    }
    let socket = fs::read_to_string(supervisor.with_extension("socket"))?;
    let served_from = PathBuf::from(socket.trim()).parent().context("a socket without a folder")?.to_path_buf();
    assert!(served_from.is_dir());
    run.signal(libc::SIGKILL);
    all_gone(&family).await?;
    assert!(!served_from.exists(), "{} is left", served_from.display());
    Ok(())
}
