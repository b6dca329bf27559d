package debian

// Workload is something to run in an image. It says one thing when it has
// done its work: how long that takes is how long the start takes.
type Workload struct {
	Name    string
	Image   Recipe
	Command []string
	User    string // who runs it, by name; "" is the image's user, root
	Line    string // how the first line begins that it prints, on either stream

	// Other is another use of the same program, that reads more or less.
	Other []string
}

const postgresBin = "/usr/lib/postgresql/15/bin/"

// Workloads are what the images are measured with, in the order of Images.
var Workloads = []Workload{
	{Name: "sh", Image: Base, Command: []string{"sh", "-c", "ls /; echo ok"}, Line: "bin", Other: []string{"sh", "-c", "dpkg -l"}},
	{Name: "python", Image: Python, Command: []string{"python3", "-c", "print(1)"}, Line: "1", Other: []string{"python3", "-c", "import sqlite3, ssl, asyncio, email"}},
	{Name: "numpy", Image: Numpy, Command: []string{"python3", "-c", "import numpy; print(numpy.arange(3))"}, Line: "[0 1 2]", Other: []string{"python3", "-c", "print(1)"}},
	{Name: "nginx", Image: Nginx, Command: []string{"nginx", "-t"}, Line: "nginx: the configuration file", Other: []string{"nginx", "-V"}},
	{Name: "postgres", Image: Postgres, Command: []string{postgresBin + "postgres", "--version"}, Line: "postgres (PostgreSQL) 15.", Other: []string{postgresBin + "postgres", "--describe-config"}},
	{Name: "initdb", Image: Postgres, User: "postgres", Line: "initialized", Other: []string{"sh", "-c", "ls /usr/lib"},
		// In memory: it writes and syncs 39 MB, which is no matter of the image.
		Command: []string{"sh", "-c", postgresBin + "initdb -D /dev/shm/d >/dev/null && echo initialized"}},
	{Name: "java", Image: OpenJDK, Command: []string{"java", "-version"}, Line: "openjdk version \"17.", Other: []string{"java", "--list-modules"}},
	{Name: "node", Image: NodeJS, Command: []string{"node", "-e", "console.log(1)"}, Line: "1", Other: []string{"node", "-e", "require('https'); require('zlib'); require('crypto').randomBytes(8)"}},
}
