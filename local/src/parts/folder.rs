//! Where things are: the workspace, the installed parts in it, and a temporary folder for each run.

use anyhow::{Context, Result, ensure};
use rand::Rng;
use std::{
    env,
    fs::{self, File, Permissions},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Name of every run's folder below the system's temporary folder, before its random end.
const RUN_PREFIX: &str = "trunkline-run-";
/// Held locked for as long as the run lives.
const RUN_LOCK: &str = "run.lock";

/// The root of the workspace: where this crate was built, or the nearest folder above the current one that looks like it.
///
/// Fails when neither is there, as when the binary was copied to another machine.
pub fn workspace() -> Result<PathBuf> {
    let built_at = Path::new(env!("CARGO_MANIFEST_DIR")).parent().map(Path::to_path_buf);
    let current = env::current_dir().unwrap_or_default();
    built_at
        .into_iter()
        .chain(current.ancestors().map(Path::to_path_buf))
        .find(|folder| folder.join("Cargo.toml").is_file() && folder.join("supabase").is_dir())
        .context("this is not inside a checkout of Trunkline: no folder above has Cargo.toml and supabase/")
}

/// The ignored folder of the workspace that holds installed parts; made when it is not there.
pub fn parts() -> Result<PathBuf> {
    let folder = workspace()?.join(".trunkline");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// A temporary folder of one run, outside the checkout, which the database server's unprivileged user may not be able to enter.
///
/// It is removed when dropped; a run that was killed leaves its folder to the next one, which sees from the lock that nobody lives there.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
    kept: bool,
}

impl RunFolder {
    /// Makes a folder that others may enter and not list, and clears away those of dead runs.
    pub fn create() -> Result<Self> {
        let parent = env::temp_dir();
        clear_dead_runs(&parent);
        let name: String = rand::rng().sample_iter(rand::distr::Alphanumeric).take(10).map(char::from).collect();
        let path = parent.join(format!("{RUN_PREFIX}{name}"));
        // Locked before it has its name, so that another run never sees it unlocked.
        let unnamed = parent.join(format!(".{RUN_PREFIX}{name}"));
        fs::create_dir(&unnamed).with_context(|| format!("cannot make a folder in {}", parent.display()))?;
        fs::set_permissions(&unnamed, Permissions::from_mode(0o711))?;
        let lock = File::create(unnamed.join(RUN_LOCK))?;
        lock.lock()?;
        fs::rename(&unnamed, &path)?;
        Ok(Self { path, _lock: lock, kept: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new folder in it with this mode.
    pub fn subfolder(&self, name: &str, mode: u32) -> Result<PathBuf> {
        let folder = self.path.join(name);
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(mode))?;
        Ok(folder)
    }

    /// Leaves the folder where it is when the run ends, for a person to look at.
    pub fn keep(&mut self) {
        self.kept = true;
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        if !self.kept {
            let _gone = fs::remove_dir_all(&self.path);
        }
    }
}

fn clear_dead_runs(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if !entry.file_name().to_string_lossy().starts_with(RUN_PREFIX) {
            continue;
        }
        // A folder of another user cannot be opened or removed: it is theirs to clear.
        if let Ok(lock) = File::options().write(true).open(path.join(RUN_LOCK))
            && lock.try_lock().is_ok()
        {
            let _theirs = fs::remove_dir_all(&path);
        }
    }
}

/// Copies a folder and all below it, keeping modes and symbolic links.
pub fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_all(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Sum of the sizes of all files below a folder, in bytes; what vanishes meanwhile is not counted.
pub fn size(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => size(&entry.path()),
            Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |meta| meta.len()),
            _ => 0,
        })
        .sum()
}

/// Fails with a clear message unless `program` can be found on the PATH.
pub fn require_program(program: &str, purpose: &str) -> Result<()> {
    let found =
        env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()));
    ensure!(found, "`{program}` is not installed: it is needed {purpose}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_folder_lives_as_long_as_its_run_and_is_left_alone_by_others() {
        let first = RunFolder::create().unwrap();
        let second = RunFolder::create().unwrap();
        assert!(first.path().is_dir());
        let gone = first.path().to_path_buf();
        drop(first);
        assert!(!gone.exists());
        assert!(second.path().is_dir());
    }

    #[test]
    fn the_folder_of_a_killed_run_is_cleared_by_the_next() {
        let parent = RunFolder::create().unwrap();
        let dead = parent.path().join(format!("{RUN_PREFIX}dead"));
        fs::create_dir(&dead).unwrap();
        File::create(dead.join(RUN_LOCK)).unwrap();
        let living = parent.path().join(format!("{RUN_PREFIX}living"));
        fs::create_dir(&living).unwrap();
        let lock = File::create(living.join(RUN_LOCK)).unwrap();
        lock.lock().unwrap();
        clear_dead_runs(parent.path());
        assert!(!dead.exists());
        assert!(living.exists());
    }
}
