//! The carriers' vectors, all of them: what the official SDKs sign and refuse, and the documents that they write.

use anyhow::Result;
use local::parts::folder;
use serde_json::{Value, json};
use tests::vectors::carriers::{judge_golden, judge_plivo, judge_telnyx, judge_twilio, judge_vonage};

fn vectors(name: &str) -> Result<Vec<Value>> {
    let path = folder::workspace()?.join(format!("tests/vectors/{name}.json"));
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

#[test]
fn every_verdict_is_the_one_that_is_wanted() -> Result<()> {
    type Judge = fn(&Value) -> Result<()>;
    let carriers: [(&str, Judge, usize); 4] = [
        ("plivo", judge_plivo, 27),
        ("twilio", judge_twilio, 20),
        ("telnyx", judge_telnyx, 12),
        ("vonage", judge_vonage, 10),
    ];
    for (name, judge, least) in carriers {
        let vectors = vectors(name)?;
        assert!(vectors.len() >= least, "{name} has {} vectors", vectors.len());
        let wrong: Vec<String> = vectors
            .iter()
            .filter_map(|vector| judge(vector).err().map(|error| format!("{}: {error}", vector["id"])))
            .collect();
        assert_eq!(wrong, [""; 0]);
    }
    Ok(())
}

#[test]
fn every_golden_document_is_written_again_as_it_is() -> Result<()> {
    let documents = vectors("xml_golden")?;
    assert!(documents.len() >= 10);
    let wrong: Vec<String> = documents
        .iter()
        .filter_map(|document| judge_golden(document).err().map(|error| format!("{}: {error}", document["id"])))
        .collect();
    assert_eq!(wrong, [""; 0]);
    Ok(())
}

#[test]
fn a_vector_that_says_the_opposite_fails_and_so_does_one_of_another_shape() -> Result<()> {
    let mut vector = vectors("twilio")?.remove(0);
    vector["valid"] = json!(false);
    assert!(judge_twilio(&vector).is_err());
    assert!(judge_twilio(&json!({ "valid": false })).is_err());
    let mut document = vectors("xml_golden")?.remove(0);
    document["xml"] = json!("<Response><Levitate/></Response>");
    assert!(judge_golden(&document).is_err());
    Ok(())
}

#[test]
fn a_subaccount_s_token_is_judged_by_the_header_that_it_signs() -> Result<()> {
    let all = vectors("plivo")?;
    let find = |id: &str| all.iter().find(|vector| vector["id"] == id).cloned().unwrap_or_default();
    let main = find("plivo-v3-post-query")["secret"].clone();
    let mut vector = find("plivo-v3-subaccount-own");
    vector["secret"] = main;
    vector["valid"] = json!(false);
    judge_plivo(&vector)?;
    vector["header_under_test"] = json!("X-Plivo-Signature-Ma-V3");
    vector["valid"] = json!(true);
    judge_plivo(&vector)
}
