//! `supabase/types.ts`, as a web app uses it.

use anyhow::Result;
use local::parts::{
    folder::{self, RunFolder},
    install,
    progress::Progress,
};
use serde_json::json;
use std::fs;
use tokio::process::Command;

const PROGRAM: &str = "tests/clients/types.ts";

/// Compiles the program against these types; what the compiler said.
async fn compile(types: &str) -> Result<String> {
    folder::require_program("node", "to run TypeScript's compiler")?;
    let folder = RunFolder::create()?;
    let place = |name: &str| folder.path().join(name);
    // A package is looked for beside the program that wants it.
    std::os::unix::fs::symlink(install::supabase_js(&Progress::hidden()).await?, place("node_modules"))?;
    fs::copy(folder::workspace()?.join(PROGRAM), place("program.ts"))?;
    fs::write(place("types.ts"), types)?;
    let options = json!({
        "compilerOptions": {
            "strict": true, "noEmit": true, "target": "es2022", "module": "nodenext", "lib": ["es2022", "dom"], "types": [],
            // The client's own declarations want Node's.
            "skipLibCheck": true,
        },
        "files": ["program.ts"],
    });
    fs::write(place("tsconfig.json"), options.to_string())?;
    let output = Command::new("node")
        .arg(install::typescript(&Progress::hidden()).await?)
        .args(["--project", "."])
        .current_dir(folder.path())
        .kill_on_drop(true)
        .output()
        .await?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(if output.status.success() { String::new() } else { said })
}

#[tokio::test]
async fn a_web_app_compiles_against_the_types_and_its_mistakes_do_not() -> Result<()> {
    let types = fs::read_to_string(folder::workspace()?.join("supabase/types.ts"))?;
    assert_eq!(compile(&types).await?, "");

    // Each wrong type, and the line of the program that must not compile for it.
    let changes = [
        ("\"score\": number", "\"score\": string", "exact<number>()(lead.score)"),
        ("\"name\": string,\"notes\"", "\"name\"?: string | null,\"notes\"", "exact<string>()(lead.name)"),
        ("\"create_campaign\":", "\"make_campaign\":", "rpc('create_campaign', { name"),
        ("\"permission\": string }; Returns: boolean", "\"permission\": string }; Returns: string", "(allowed.data)"),
        ("referencedRelation: \"pipeline_stages\"", "referencedRelation: \"pipelines\"", "(lead.stage)"),
    ];
    let mut wrong = types;
    for (from, to, _) in changes {
        assert!(wrong.contains(from), "{from} is not in the types");
        wrong = wrong.replace(from, to);
    }
    let (said, program) = (compile(&wrong).await?, fs::read_to_string(folder::workspace()?.join(PROGRAM))?);
    for (_, to, place) in changes {
        let line = program.lines().position(|line| line.contains(place)).map_or(0, |index| index + 1);
        assert!(line > 0 && said.contains(&format!("program.ts({line},")), "{to} compiles at line {line}: {said}");
    }
    Ok(())
}
