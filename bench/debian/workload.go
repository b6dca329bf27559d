package debian

// Workload is something to run in an image. It says one thing when it has
// done its work: how long that takes is how long the start takes.
type Workload struct {
	Name    string
	Image   Recipe
	Command []string
	User    string // who runs it, by name; "" is the image's user, root
	Line    string // how the first line begins that it prints, on either stream
}

const postgresBin = "/usr/lib/postgresql/15/bin/"

// Workloads are what the images are measured with, in the order of Images.
var Workloads = []Workload{
	{Name: "sh", Image: Base, Command: []string{"sh", "-c", "ls /; echo ok"}, Line: "bin"},
	{Name: "python", Image: Python, Command: []string{"python3", "-c", "print(1)"}, Line: "1"},
	{Name: "numpy", Image: Numpy, Command: []string{"python3", "-c", "import numpy; print(numpy.arange(3))"}, Line: "[0 1 2]"},
	{Name: "nginx", Image: Nginx, Command: []string{"nginx", "-t"}, Line: "nginx: the configuration file"},
	{Name: "postgres", Image: Postgres, Command: []string{postgresBin + "postgres", "--version"}, Line: "postgres (PostgreSQL) 15."},
	{Name: "initdb", Image: Postgres, User: "postgres", Line: "initialized",
		Command: []string{"sh", "-c", postgresBin + "initdb -D /tmp/d >/dev/null && echo initialized"}},
	{Name: "java", Image: OpenJDK, Command: []string{"java", "-version"}, Line: "openjdk version \"17."},
	{Name: "node", Image: NodeJS, Command: []string{"node", "-e", "console.log(1)"}, Line: "1"},
}
