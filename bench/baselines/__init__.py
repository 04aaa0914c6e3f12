"""What lorapar is measured against, each way written afresh and as plain as its original."""
