() => document.addEventListener("drop", async (event) => {
    // Gradio takes folders by its button alone: read one that is dropped anywhere, and hand on its files.
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry());
    if (!entries.some((entry) => entry?.isDirectory)) return;
    event.preventDefault();
    event.stopPropagation();
    const found = new DataTransfer();
    const ask = (owner, call) => new Promise((done, failed) => owner[call](done, failed));
    const read = async (entry) => {
        if (entry.isFile) return void found.items.add(await ask(entry, "file"));
        const reader = entry.createReader();
        for (let some; (some = await ask(reader, "readEntries")).length;) for (const one of some) await read(one);
    };
    for (const entry of entries) await read(entry);
    const input = document.querySelector("#folder input[type=file]");
    input.files = found.files;
    input.dispatchEvent(new Event("change"));
}, true)
